"""A ClientApp that attacks the site it was shipped to: as the relay's own user, and as one that nobody named.

Words that nobody may ever see are planted in the data, in names of files and in the settings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from site_files import COORDINATOR, site_tables, write_site

from client.agent import HEALTH, MALFORMED, SERVICE
from client.audit_log import AuditLog
from common.code import code_digest
from common.model import digest_of
from common.plan import Plan
from common.protos import site_pb2 as pb
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection
from common.signing import PLAN

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")

PROGRAM = Path(sys.executable).with_name("consilium")
HOSTILE = Path(__file__).with_name("hostile_app.py")
RELAY, STRANGER = 61001, 65534
CANARY = "canary-4cf1"
DENIED = {"EACCES", "EPERM"}
DESCRIBE, TRAIN, CHECK = f"/{SERVICE}/Describe", f"/{SERVICE}/Train", f"/{HEALTH}/Check"


@dataclass(frozen=True)
class Besieged:
    """A running agent, and where its things are."""

    folder: Path
    process: psutil.Popen
    model_digest: str

    @property
    def socket(self) -> Path:
        return self.folder / "agent.sock"

    def attacked_by(self, user: int, **orders: Any) -> tuple[dict[str, str], dict[str, bytes]]:
        """Outcomes of all attempts, and what came back for all calls, none of which holds a planted word."""
        told = {"user": user, "socket": str(self.socket), "calls": [], **orders}
        done = subprocess.run(
            [sys.executable, "-I", str(HOSTILE)],
            input=json.dumps(told).encode(),
            capture_output=True,
            check=True,
            timeout=120,
            cwd="/",
        )
        answer = json.loads(done.stdout)
        heard = {name: bytes.fromhex(text) for name, text in answer["heard"].items()}
        everything = b"".join([done.stdout, done.stderr, *heard.values()])
        assert CANARY.encode() not in everything and CANARY.encode().hex().encode() not in everything
        return answer["outcomes"], heard

    def everything_there(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture(scope="module")
def besieged() -> Iterator[Besieged]:
    """An agent whose socket lies beside its settings and data, as it does unless told otherwise."""
    with tempfile.TemporaryDirectory(prefix="besieged-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        old = os.umask(0o077)
        model = folder / f"model-{CANARY}"
        model.mkdir()
        (model / "config.json").write_text("{}")
        (model / "model.safetensors").write_text(CANARY)
        (folder / f"{CANARY}.csv").write_text("text,label\n" + f"patient {CANARY},urgent\n" * 40)
        tables = site_tables(
            model,
            site={"listen": "unix:agent.sock", "relay_user": str(RELAY), "trust_relay": False},
            data={"default": {"path": f"{CANARY}.csv", "columns": {"text": "text"}}, CANARY: {"path": f"{CANARY}.csv"}},
        )
        source = write_site(folder, tables)
        (folder / "agent.log").touch()
        os.umask(old)
        with (folder / "agent.log").open("wb") as log:
            process = psutil.Popen(
                [PROGRAM, "site", "agent", "--config", source],
                env={**os.environ, "OMP_NUM_THREADS": "1", "SECRET": CANARY},
                stdout=log,
                stderr=log,
            )
        try:
            while "serves at" not in (told := (folder / "agent.log").read_text()):
                assert process.poll() is None, told
                time.sleep(0.05)
            made = Besieged(folder, process, digest_of(model))
            made.attacked_by(RELAY, calls=[["a plan", DESCRIBE, signed(made, "run", "default")[1]]])
            yield made
        finally:
            process.terminate()
            try:
                process.wait(60)
            except psutil.TimeoutExpired:
                process.kill()
                raise


def asked(content: Any) -> list[str]:
    return [content.SerializeToString().hex()]


def train(plan: str = "", run: str = "run", data: bytes = b"", **layout: list[int]) -> list[str]:
    """The frames of a request to train."""
    entries = [pb.TensorLayout(name=name, shape=shape) for name, shape in layout.items()]
    header = pb.TrainRequestHeader(run_id=run, round=1, plan_digest=plan, layout=entries)
    frames = [pb.TrainRequestFrame(header=header), *([pb.TrainRequestFrame(chunk=data)] if data else [])]
    return [frame.SerializeToString().hex() for frame in frames]


def signed(besieged: Besieged, run: str, data: str) -> tuple[Plan, list[str]]:
    """A plan that the coordinator itself has signed, and the question for it."""
    plan = Plan(
        run_id=run,
        seed=0,
        data=data,
        model_digest=besieged.model_digest,
        task=TaskSection(labels=("urgent", "routine")),
        lora=LoraSection(),
        privacy=PrivacySection(epsilon=1.0),
        phases=(PhaseSection(name="lora", rounds=1, sample_rate=0.25),),
        adapter_digest="0" * 64,
        code_digest=code_digest(),
    )
    signature = COORDINATOR.sign(PLAN, plan.digest().encode())
    request = pb.DescribeRequest(
        run_id=run, plan=plan.canonical(), code_digest=code_digest(), signature=signature, schema_version=1
    )
    return plan, asked(request)


# ------------------------------------------------------------------------------------------------------------ attacks


@pytest.mark.parametrize("user", [RELAY, STRANGER], ids=["the relay's user", "another user"])
def test_files_and_the_agents_process_are_closed_to_shipped_code(besieged: Besieged, user: int) -> None:
    state = besieged.folder / "state"
    paths = {
        "data": besieged.folder / f"{CANARY}.csv",
        "settings": besieged.folder / "site.toml",
        "model": besieged.folder / f"model-{CANARY}",
        "state": state,
        **{f"state/{entry}": state / entry for entry in ("ledger.sqlite", "audit.jsonl", "secrets", "site.key")},
        "counter": besieged.folder / "consilium.counter",
    }
    assert all(path.exists() for path in paths.values())
    before = besieged.everything_there()
    outcomes, _ = besieged.attacked_by(
        user,
        paths={name: str(path) for name, path in paths.items()},
        process=besieged.process.pid,
        beside=str(besieged.socket),
    )
    assert outcomes.pop("inner socket") == "got []"  # there is one, and no name leads to it
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in DENIED} == {}
    assert len(outcomes) == 4 * len(paths) + 9 + 6
    assert besieged.everything_there() == before and besieged.process.is_running()


def test_a_user_that_nobody_named_hears_nothing(besieged: Besieged) -> None:
    calls = [["health", CHECK, [""]], ["describe", DESCRIBE, [""]]]
    _, heard = besieged.attacked_by(STRANGER, calls=calls, noise={"noise": b"hello".hex()})
    assert heard == {"health": b"", "describe": b"", "noise": b""}


def test_what_is_no_call_is_answered_without_a_word_of_the_site(besieged: Besieged) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    noise: Mapping[str, bytes] = {
        "http": b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
        "zeros": bytes(100_000),
        "a frame too long": preface + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(1 << 20),
        "headers without end": preface + b"\0\0\0\4\0\0\0\0\0" + (b"\0\x40\0\1\0\0\0\0\1" + bytes(16384)) * 50,
        "settings over and over": preface + b"\0\0\0\4\0\0\0\0\0" * 20_000,
    }
    _, heard = besieged.attacked_by(RELAY, noise={name: said.hex() for name, said in noise.items()})
    assert set(heard) == set(noise)
    outcomes, _ = besieged.attacked_by(RELAY, crowd=60)
    assert int(outcomes["crowd"]) <= 16


def test_calls_with_forged_content_are_answered_with_constants(besieged: Besieged) -> None:
    before = besieged.everything_there()
    plan, question = signed(besieged, "a/../../../hostile-x", "default")
    _, elsewhere = signed(besieged, "b", "../../hostile-x")
    calls: list[tuple[str, str, list[str]]] = [
        ("no protobuf", TRAIN, ["ff" * 100]),
        ("too large", TRAIN, ["00" * (5 << 20)]),
        ("no header", TRAIN, [pb.TrainRequestFrame(chunk=b"1234").SerializeToString().hex()]),
        ("more than there is memory", TRAIN, train(a=[1 << 62, 1 << 62])),
        ("another length", TRAIN, train(a=[100], data=bytes(10))),
        ("path for a run", TRAIN, train(run="../../hostile-x")),
        ("path for a plan", TRAIN, train(plan="../../../../etc/passwd")),
        ("paths for tensors", TRAIN, train(**{"../../hostile-x": [1], "/etc/passwd": [1]}, data=bytes(4))),
        ("path for a method", f"/{SERVICE}/../../etc/passwd", [""]),
        (
            "path for a description",
            DESCRIBE,
            asked(pb.DescribeRequest(run_id="../../hostile-x", plan="../../hostile-x")),
        ),
        ("nothing that ends", DESCRIBE, asked(pb.DescribeRequest(plan="[" * 100_000, code_digest=code_digest()))),
        ("plan of the coordinator", DESCRIBE, question),
        ("other data of the coordinator", DESCRIBE, elsewhere),
        ("round of that plan", TRAIN, train(plan.digest(), plan.run_id)),
    ]
    _, heard = besieged.attacked_by(RELAY, calls=calls)
    assert MALFORMED.encode() in heard["no header"]  # which shows that texts are not packed on their way
    for name in ("more than there is memory", "another length", "paths for tensors"):
        assert MALFORMED.encode() in heard[name], name
    assert b"unknown-plan" in heard["path for a run"] and b"unknown-plan" in heard["path for a plan"]
    assert all(answer for answer in heard.values())
    assert besieged.everything_there() - before <= {f"state/ledger.sqlite-{end}" for end in ("wal", "shm")}
    assert not (besieged.folder.parent / "hostile-x").exists()
    AuditLog(besieged.folder / "state" / "audit.jsonl")  # its chain is whole


def test_ten_thousand_calls_leave_memory_and_descriptors_as_they_were(besieged: Besieged) -> None:
    body = pb.DescribeRequest(run_id="../../hostile-x", plan="{}", code_digest="no such code").SerializeToString().hex()
    used = []
    for number in (3_000, 7_000):
        outcomes, heard = besieged.attacked_by(RELAY, flood=[DESCRIBE, body, number])
        assert outcomes["flood"] == str(number) and heard["flood"].count(b"code-mismatch") == number
        used.append((besieged.process.memory_info().rss, besieged.process.num_fds()))
    assert used[1][0] - used[0][0] < 8 << 20 and used[1][1] <= used[0][1]
    assert besieged.process.net_connections(kind="inet") == []
    _, heard = besieged.attacked_by(RELAY, calls=[["health", CHECK, [""]]])
    assert b"\0\0\0\0\2\x08\x01" in heard["health"]  # one message: SERVING


# --------------------------------------------------------------------------------------------------------- inspection

SECRETIVE = """
import ctypes, os, sys
from client.agent import forbid_inspection
user = int(sys.argv[1])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
libc = ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as after a start under this user
print("open", flush=True)
sys.stdin.readline()
forbid_inspection()
print("closed", flush=True)
sys.stdin.readline()
"""


def test_an_agent_that_forbids_inspection_is_closed_to_processes_of_its_own_user(besieged: Besieged) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SECRETIVE, str(RELAY)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        outcomes, _ = besieged.attacked_by(RELAY, paths={"environ": f"/proc/{process.pid}/environ"})
        assert outcomes["read environ"].startswith("got ")
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"closed\n"
        outcomes, _ = besieged.attacked_by(RELAY, process=process.pid)
    assert outcomes.pop("kill") == "got None" and process.returncode == -9
    assert set(outcomes.values()) <= DENIED and len(outcomes) == 8
