"""Sites whose agents are forks of one process that has imported everything, and are killed again and again."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

# The test folders are no packages; last, so that nothing is hidden by a module beside this file.
sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "privacy"))

from site_books import Auditor, Books
from site_files import site_tables, write_site
from small_sites import LABELS, classifier, phase, plan_for, random_state, request_for, shown
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from client.agent import FAULT
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.code import code_digest
from common.errors import ConnectionFailed
from common.messages import DescribeRequest, Release, SiteDescription, TrainReply, TrainRequest
from common.plan import Plan
from common.rpc import AgentAddress, RemoteSite

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("preloaded.py")
PATIENCE = 60.0
SERVES = "serves at"
KILLED = -signal.SIGKILL
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
WORDS = ("chest", "pain", "fever", "cough", "rash", "fall", "cut", "mild", "severe", "today")
PUBLIC_SIZE = 40
Answer = TypeVar("Answer")


class Life:
    """A process, and what it says."""

    def __init__(self, parent: Parent, process: int, output: int) -> None:
        self._parent, self.process, self._output = parent, process, output
        self.log = ""
        self.code: int | None = None

    def until(self, words: str, seconds: float = PATIENCE) -> bool:
        """Reads on until the words are said; ``False``: the process ended without."""
        deadline = time.monotonic() + seconds
        while words not in self.log:
            if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"waited {seconds:.0f} s for {words!r}:\n{self.log}")
            said = os.read(self._output, 1 << 16)
            if not said:
                self.end()
                return False
            self.log += said.decode()
        return True

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet, as far as its output tells."""
        while self.code is None and select.select([self._output], [], [], 0)[0]:
            said = os.read(self._output, 1 << 16).decode()
            self.log += said
            if not said:
                self.end()
        return self.code is None

    def end(self, how: int | None = None, seconds: float = PATIENCE) -> int:
        """Sends a signal, if one is given, and waits for the end; returns the exit code."""
        if self.code is None:
            if how is not None:
                self.strike(how)
            deadline = time.monotonic() + seconds
            while said := self._read_on(deadline):
                self.log += said
            self.code = self._parent.wait(self.process)
            os.close(self._output)
        return self.code

    def strike(self, how: int) -> None:
        """Sends a signal, if the process is still there."""
        with suppress(ProcessLookupError):
            os.kill(self.process, how)

    def _read_on(self, deadline: float) -> str:
        if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"process {self.process} does not end:\n{self.log}")
        return os.read(self._output, 1 << 16).decode()


class Parent:
    """The process that has imported everything."""

    def __enter__(self) -> Self:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                stdin=theirs,
                cwd=REPOSITORY,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
            )
        self._living: set[int] = set()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._living:
            os.kill(process, signal.SIGKILL)
        self._orders.close()
        self._process.wait(timeout=PATIENCE)

    def run(self, *arguments: str, **mortality: Any) -> Life:
        """``consilium`` with arguments, in a fork; see ``preloaded._live`` for the rest."""
        output, theirs = os.pipe()
        process = self._ask({"run": arguments, **mortality}, [theirs])
        os.close(theirs)
        self._living.add(process)
        return Life(self, process, output)

    def wait(self, process: int) -> int:
        """The exit code of a process that has ended."""
        self._living.discard(process)
        return self._ask({"wait": process})

    def rehearse(self, site: MortalSite) -> None:
        """Does a round in the process itself, so that no fork does for the first time what takes long."""
        question = shown(site.plan("rehearsal"))
        self._ask({"rehearse": str(site.config), "plan": question.plan, "signature": question.signature})

    def _ask(self, order: Mapping[str, Any], descriptors: list[int] | None = None) -> int:
        socket.send_fds(self._orders, [json.dumps(order).encode()], descriptors or [])
        answer = self._orders.recv(1 << 16)
        if not answer:
            raise RuntimeError("the process that has imported everything has ended; its last words are on stderr")
        return int(json.loads(answer))


@dataclass
class MortalSite:
    """A site's folder, the coordinator that asks it, and the auditor who looks at the disk after each of its lives."""

    parent: Parent
    folder: Path
    model: Path
    network: AdaptedModel
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    patience: float = PATIENCE
    """Seconds to wait for an agent that does not accept a connection."""

    def __post_init__(self) -> None:
        """Writes the folder; nothing runs yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [f"{a} {b},{LABELS[(i + j) % 3]}" for i, a in enumerate(WORDS) for j, b in enumerate(WORDS[:3])]
        (self.folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
        usual = {
            "population": {"public_size": PUBLIC_SIZE, "lifetime_epsilon": 1e3},
            "device": {"device": "cpu", "physical_batch": 4, "threads": 1},
        }
        tables = site_tables(self.model, **{**usual, **self.sections})
        self.config = write_site(self.folder, tables)
        self.auditor = Auditor(self.state, self.folder / "consilium.counter")
        self.adapter: AdapterState = random_state(self.network)

    @property
    def state(self) -> Path:
        """The site's state."""
        return self.folder / "state"

    @property
    def listen(self) -> str:
        """Where the agent serves."""
        return f"unix:{self.folder / 'run' / 'agent.sock'}"

    def plan(self, run: str = "run", **settings: Any) -> Plan:
        """A plan of three rounds of two steps."""
        return plan_for(self.network, [phase()], run, code_digest=code_digest(), **settings)

    def agent(self, **mortality: Any) -> Life:
        """``consilium site agent``; it serves now, or has ended."""
        life = self.command("agent", **mortality)
        life.until(SERVES)
        return life

    def command(self, name: str, *arguments: str, **mortality: Any) -> Life:
        """``consilium site NAME``, just started."""
        return self.parent.run("site", name, *arguments, "--config", str(self.config), **mortality)

    @contextmanager
    def serving(self, **mortality: Any) -> Iterator[Life]:
        """An agent that lives as long as this lasts, and ends in order; then the disk is looked at."""
        life = self.agent(**mortality)
        assert life.code is None, life.log
        try:
            yield life
        except BaseException:
            life.end(signal.SIGKILL)
            raise
        assert life.end(signal.SIGTERM) == 0, life.log
        self.auditor.inspect(killed=False)

    def tell(self, question: DescribeRequest) -> SiteDescription:
        """The site's answer to a question of the coordinator."""
        with self._remote() as site:
            return site.describe(question)

    def ask(self, request: TrainRequest) -> TrainReply:
        """The site's reply to a request of the coordinator."""
        with self._remote() as site:
            reply = site.train(request)
        if isinstance(reply, Release):
            self.auditor.receive(reply)
        return reply

    def describe(self, plan: Plan, witness: str = "") -> SiteDescription | None:
        """Shows a plan; ``None``: no answer, since the agent died or met a fault."""
        return self.try_to(lambda: self.tell(shown(plan, code_digest(), witness=witness)))

    def train(self, plan: Plan, round: int = 1) -> TrainReply | None:
        """Asks for a round; ``None``: no answer, since the agent died or met a fault."""
        return self.try_to(lambda: self.ask(request_for(plan, self.adapter, round)))

    def try_to(self, call: Callable[[], Answer]) -> Answer | None:
        """The answer to a call; ``None``: there was none, and the agent told nobody why."""
        try:
            return call()
        except ConnectionFailed:
            return None
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, FAULT)
            return None

    def release(self, plan: Plan, round: int = 1) -> Release:
        """The release of a round."""
        reply = self.train(plan, round)
        assert isinstance(reply, Release), reply
        return reply

    def books(self, killed: bool = True) -> Books:
        """What lies on the disk."""
        return self.auditor.inspect(killed)

    def _remote(self) -> RemoteSite:
        return RemoteSite(AgentAddress(self.listen), timeout=self.patience)


def write_model(folder: Path) -> Path:
    """A BERT of three layers and hidden size 32 with random weights; below the top two, activations are kept."""
    import torch

    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    fast.save_pretrained(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder


def network_of(model: Path) -> AdaptedModel:
    """The coordinator's view of the model: its adapter's layout."""
    return classifier(model)


@contextmanager
def disk(folder: Path, *mounts: str) -> Iterator[tuple[int, Path]]:
    """A view of the disks in which something else is mounted; yields the process that holds it, and its root folder.

    Nothing of it is left afterwards, and nobody but those who share it sees it.

    Args:
        mounts: commands for a shell that may mount; ``$at`` is the folder.
    """
    script = " && ".join([*mounts, "echo ready", "exec cat"])
    holder = subprocess.Popen(
        [*NAMESPACE, "sh", "-c", script],
        env={**os.environ, "at": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        yield holder.pid, Path(f"/proc/{holder.pid}/root")
        holder.stdin.close()


def can_mount() -> bool:
    """Whether this system lets a test mount a disk."""
    return (
        shutil.which("unshare") is not None and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
    )
