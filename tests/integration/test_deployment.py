"""A real deployment: SuperLink with TLS and node keys, three SuperNodes and site agents, runs submitted by command."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from agents import ENVIRONMENT, INTERRUPTIBLE, Federation, SiteAgent, agent_tables
from credentials import write_certificates
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from peft import PeftModel
from safetensors.numpy import load, load_file
from site_files import COORDINATOR
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification

import consilium
from common.config import RunConfig
from common.toml_settings import validate
from server.lock import RunLock
from server.watcher import Silent
from simulations.simulate import simulate

LABELS = ["urgent", "routine", "review"]
HEAD = {"name": "head", "rounds": 1, "sample_rate": 1.0, "train": ["head"], "learning_rate": 1.0}
LORA = {"name": "lora", "rounds": 2, "sample_rate": 0.5, "train": ["head", "lora"], "learning_rate": 0.5}
ROUNDS = 3
LOOK = 0.02
RUN_TIMEOUT = 240.0

DESCRIPTION = {
    *("site", "status", "refusal", "code_digest", "tasks", "max_rank", "public_size", "privacy", "schema_version"),
}
RELEASE = {"kind", "site", "run_id", "round", "request_digest", "head", "metrics", "schema_version"}
STATEMENT = {"epsilon", "delta", "unit", "neighbouring", "accountant", "steps", "phases"}
PHASE_STATEMENT = {"name", "sample_rate", "noise_multiplier", "clip_norm", "steps"}


def _tables(federation: Federation, **sections: Any) -> dict[str, Any]:
    """The settings of a run; ``sections`` are put over them."""
    superlink = federation.deployment.superlink
    tables: dict[str, Any] = {
        "run": {"name": "triage"},
        "model": {"name": str(federation.model)},
        "task": {"labels": LABELS, "max_length": 32},
        "lora": {"layers": 2, "r": 4},
        "server": {
            "superlink": superlink.address,
            "root_certificates": str(superlink.root_certificates),
            "signing_key": str(federation.key),
            "min_sites": 3,
            "min_replies": 3,
            "round_timeout": 120.0,
        },
        "evaluation": {"path": str(federation.data)},
        "phase": [HEAD, LORA],
    }
    for section, settings in sections.items():
        tables[section] = settings if section == "phase" else {**tables.get(section, {}), **settings}
    return tables


class Command:
    """``consilium server run`` as its user starts it, in a folder of its own."""

    def __init__(self, folder: Path, *arguments: str, tables: Mapping[str, Any] | None = None) -> None:
        if tables is not None:
            (folder / "run.toml").write_bytes(tomli_w.dumps(tables).encode())
            arguments = ("--config", "run.toml", *arguments)
        self.process = subprocess.Popen(
            [*INTERRUPTIBLE, "server", "run", *arguments],
            env={**os.environ, **ENVIRONMENT},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, timeout: float = RUN_TIMEOUT) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode, stdout, stderr

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Waits for something that happens before the command ends."""
        deadline = time.monotonic() + RUN_TIMEOUT
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the awaited did not happen: {self.end()}")
            time.sleep(LOOK)


def _completed(folder: Path, *arguments: str, tables: Mapping[str, Any] | None = None) -> str:
    with Command(folder, *arguments, tables=tables) as command:
        code, stdout, stderr = command.end()
    assert code == 0, stderr
    return stdout


def _refused(folder: Path, *arguments: str, tables: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Exit code and message of a command that fails; there is nothing but the message."""
    with Command(folder, *arguments, tables=tables) as command:
        code, stdout, stderr = command.end()
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if not line.startswith("WARNING server.follow: waiting")]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return code, lines[0]


def _history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def _latest(out: Path) -> int:
    file = out / "checkpoint" / "LATEST"
    return int(file.read_text()) if file.exists() else -1


def _same_result(one: Path, other: Path) -> None:
    """The same global model after the last round, the same best adapter, the same metrics, all to the last bit."""
    for name in (f"checkpoint/{ROUNDS}/state.safetensors", "adapter/adapter_model.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[key], second[key]) for key in first)
    assert [record["metrics"] for record in _history(one)] == [record["metrics"] for record in _history(other)]


# ---- one run, looked at from all sides ------------------------------------------------------------------------------


class Tap:
    """Keeps a copy of every object that passes the SuperLink, which itself forgets them once they are delivered."""

    def __init__(self, database: Path) -> None:
        self.database = database
        with closing(sqlite3.connect(database, timeout=30.0)) as db, db:
            db.execute("CREATE TABLE tapped (object_id TEXT PRIMARY KEY, content BLOB)")
            db.execute(
                "CREATE TRIGGER tap AFTER UPDATE OF content ON objects BEGIN "
                "INSERT OR IGNORE INTO tapped VALUES (new.object_id, new.content); END"
            )

    def close(self) -> dict[str, bytes]:
        """Removes the tap; returns what it caught, by Flower's object id."""
        with closing(sqlite3.connect(self.database, timeout=30.0)) as db, db:
            caught = {identity: bytes(content) for identity, content in db.execute("SELECT * FROM tapped")}
            db.execute("DROP TRIGGER tap")
            db.execute("DROP TABLE tapped")
        return caught


@dataclass(frozen=True)
class Finished:
    """A run that has been submitted and has completed."""

    out: Path
    stdout: str
    objects: Mapping[str, bytes]
    """Everything that crossed the network, in Flower's encoding."""

    @property
    def replies(self) -> list[Message]:
        """What the sites sent."""
        messages = []
        for identity, content in self.objects.items():
            if content.startswith(b"Message "):
                message = inflate_object_from_contents(identity, dict(self.objects), keep_object_contents=True)
                assert isinstance(message, Message)
                if message.metadata.reply_to_message_id:
                    messages.append(message)
        return messages

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return dict(json.loads((self.out / "summary.json").read_text()))


@pytest.fixture(scope="module")
def finished(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of three rounds in two phases. Its paths are relative: the coordinator works in another folder."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "held-out").symlink_to(federation.data)
    tap = Tap(federation.deployment.folder / "superlink.db")
    stdout = _completed(folder, "--out", "out", tables=_tables(federation, evaluation={"path": "held-out"}))
    return Finished(folder / "out", stdout, tap.close())


def test_a_submitted_run_completes_and_leaves_its_documented_folder(finished: Finished) -> None:
    found = {path.name for path in finished.out.iterdir() if not path.name.startswith(".")}
    assert found == {
        *("run.toml", "manifest.json", "sites.json", "heads.jsonl", "rounds.jsonl", "rounds", "checkpoint"),
        *("adapter", "tensorboard", "answers.json", "summary.json"),
    }
    history = _history(finished.out)
    assert [(record["round"], record["phase"]) for record in history] == [
        *((0, "base"), (1, "head"), (2, "lora"), (3, "lora")),
    ]
    for record in history[1:]:
        assert record["cohort"] == record["admitted"] == ["north", "south", "west"]
        assert record["refused"] == record["rejected"] == {}
        assert record["bytes_up"] > 0 and record["bytes_down"] > 0
    assert "Global model by round" in finished.stdout and str(finished.out / "adapter") in finished.stdout
    events = EventAccumulator(str(finished.out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/loss")] == [0, 1, 2, 3]
    manifest = json.loads((finished.out / "manifest.json").read_text())
    assert manifest["kind"] == "deployment" and manifest["run_id"] == finished.summary()["run_id"]


def test_the_saved_adapter_loads_in_plain_peft(finished: Finished, federation: Federation) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(federation.model, num_labels=len(LABELS))
    model = PeftModel.from_pretrained(base, finished.out / "adapter")
    saved = load_file(finished.out / "adapter" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items()}
    assert len(saved) == 2 * 2 * 2 + 2  # A and B of query and value in two layers; the head's weight and bias
    for name, array in saved.items():
        where = name.replace("classifier.", "classifier.modules_to_save.")
        assert np.array_equal(loaded[where].numpy(), array)


def test_with_fixed_test_keys_no_site_claims_an_epsilon(finished: Finished) -> None:
    sites = finished.summary()["sites"]
    assert list(sites) == ["north", "south", "west"]
    assert {site: entry["public_size"] for site, entry in sites.items()} == {"north": 40, "south": 25, "west": 12}
    for entry in sites.values():
        assert entry["privacy"].keys() == STATEMENT
        assert entry["privacy"]["epsilon"] is None and entry["privacy"]["steps"] == ROUNDS
        assert [phase["name"] for phase in entry["privacy"]["phases"]] == ["head", "lora"]
        assert all(phase["noise_multiplier"] > 0 for phase in entry["privacy"]["phases"])
        assert entry["rounds_admitted"] == ROUNDS
    card = json.loads((finished.out / "adapter" / "consilium.json").read_text())
    assert {site: statement["epsilon"] for site, statement in card["privacy"].items()} == dict.fromkeys(sites)


def test_nothing_but_the_listed_fields_leaves_a_site(finished: Finished, federation: Federation) -> None:
    described, released = [], []
    for message in finished.replies:
        assert not message.has_error()
        header = dict(message.content.config_records["consilium"])
        if message.metadata.message_type == "query.describe":
            assert set(message.content) == {"consilium"} and header.keys() == DESCRIPTION
            privacy = json.loads(str(header["privacy"]))
            assert privacy.keys() == STATEMENT and privacy["epsilon"] is None
            assert all(phase.keys() == PHASE_STATEMENT for phase in privacy["phases"])
            described.append(header["site"])
        else:
            assert set(message.content) == {"consilium", "tensors"} and header.keys() == RELEASE
            (packed,) = message.content.array_records["tensors"].values()
            names = set(load(packed.data))
            # Round 1 trains the head alone; A never travels back, since every site has the public one.
            wanted = ("classifier.",) if header["round"] == 1 else ("classifier.", ".lora_B.")
            assert names == {name for name in _adapter_names(finished) if any(part in name for part in wanted)}
            released.append((header["round"], header["site"]))
    assert sorted(described) == ["north", "south", "west"]
    assert sorted(released) == [(round, site) for round in (1, 2, 3) for site in ("north", "south", "west")]
    texts = [row["text"].encode() for agent in federation.agents.values() for row in agent.rows]
    assert texts and not any(text in content for text in texts for content in finished.objects.values())


def _adapter_names(finished: Finished) -> set[str]:
    return set(load_file(finished.out / "adapter" / "adapter_model.safetensors"))


def test_the_result_is_bit_identical_to_a_simulation(
    finished: Finished, federation: Federation, one_thread: None
) -> None:
    tables = _tables(
        federation,
        data={"path": str(federation.data), "site_column": "hospital"},
        simulation={"seed": 0, "physical_batch": 8, "device": "cpu"},
    )
    out = finished.out.parent / "simulated"
    simulate(validate(RunConfig, tables, "test"), out, False, lambda title, rounds: nullcontext(Silent()))
    _same_result(finished.out, out)
    moved = load_file(out / "checkpoint" / str(ROUNDS) / "state.safetensors")
    assert np.any(moved["aggregator/adapter/base_model.model.classifier.bias"])  # else the comparison says nothing


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as the deployment's processes have: their number decides how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- runs that are killed -------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_result_and_is_charged_once(
    finished: Finished, federation: Federation, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with Command(tmp_path, "--out", "out", tables=_tables(federation)) as command:
        command.wait_for(lambda: any((out / "rounds" / "1").glob("*.safetensors")) or _latest(out) == 1)
        assert federation.deployment.kill_server_app() == 1
        code, _, stderr = command.end()
    assert code == 3 and "--resume" in stderr and len(stderr.splitlines()) == 1

    with Command(tmp_path, "--resume", "out") as command:
        command.wait_for(lambda: _latest(out) == 2)
        command.process.send_signal(signal.SIGKILL)
    _completed(tmp_path, "--resume", "out")  # the coordinator went on meanwhile, and is followed again
    _same_result(finished.out, out)
    summary = json.loads((out / "summary.json").read_text())
    assert {site: entry["rounds_admitted"] for site, entry in summary["sites"].items()} == dict.fromkeys(
        ("north", "south", "west"), ROUNDS
    )
    for agent in federation.agents.values():
        assert agent.charges()[summary["run_id"]] == [1, 2, 3]


def test_a_finished_run_is_shown_again_by_resume(finished: Finished) -> None:
    before = (finished.out / "summary.json").stat().st_mtime_ns
    assert "Global model by round" in _completed(finished.out.parent, "--resume", "out")
    assert (finished.out / "summary.json").stat().st_mtime_ns == before


# ---- sites ----------------------------------------------------------------------------------------------------------


def test_a_site_that_is_approved_during_the_run_joins_it_and_an_interrupted_run_is_stopped(
    federation: Federation, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tables = _tables(federation, server={"min_sites": 2, "min_replies": 2}, phase=[{**HEAD, "rounds": 50}])
    manual = federation.agent("south", folder="south-manual", policy={"approval": "manual"})
    with federation.in_this_process(manual), Command(tmp_path, "--out", "out", tables=tables) as command:
        command.wait_for((out / "rounds" / "1" / "cohort.json").exists)
        (plan,) = json.loads(manual.run("pending", "--json"))
        assert "approved" in manual.run("approve", plan["digest"][:12])
        command.wait_for(lambda: "south" in (_history(out)[1:] or [{"cohort": ()}])[-1]["cohort"])
        command.process.send_signal(signal.SIGINT)
        code, _, stderr = command.end()
        assert _gone(lambda: RunLock(out).holder())
        charged = manual.charges()
    assert code == 130 and stderr == "interrupted; what was finished is kept, continue with --resume\n"
    rounds = _history(out)[1:]
    assert rounds[0]["cohort"] == ["north", "west"]
    joined = [record["round"] for record in rounds if "south" in record["cohort"]]
    assert all("south" in record["admitted"] for record in rounds if record["round"] in joined)
    assert joined == list(range(joined[0], len(rounds) + 1))
    assert charged[plan["run"]][: len(joined)] == joined


def _gone(holder: Callable[[], int | None]) -> bool:
    """Whether the coordinator lets go of its folder soon after it was stopped."""
    deadline = time.monotonic() + 30.0
    while holder() is not None and time.monotonic() < deadline:
        time.sleep(LOOK)
    return holder() is None


def test_a_run_without_enough_sites_says_which_are_missing_and_why(federation: Federation, tmp_path: Path) -> None:
    """South's agent is down; at west's address somebody speaks for north."""
    out = tmp_path / "out"
    impostor = federation.agent("west", folder="impostor", site={"name": "north"})
    tables = _tables(federation, server={"round_timeout": 16.0})
    with federation.nobody_at("south"), federation.in_this_process(impostor):
        code, message = _refused(tmp_path, "--out", "out", tables=tables)
    assert code == 3
    assert "min_sites = 3: only 1 sites are ready (south: node-error, west: wrong-site)" in message
    assert "--resume" in message
    assert _latest(out) == 0 and not (out / "rounds").exists() and not (out / "adapter").exists()


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_superlink_of_another_authority_is_not_trusted(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_certificates(tmp_path / "other")
    tables = _tables(federation, server={"root_certificates": "other/ca.pem"})
    code, message = _refused(tmp_path, "--out", "out", tables=tables)
    assert code == 2 and "not trusted" in message and not (tmp_path / "out").exists()


def test_a_superlink_that_is_not_there_is_named(federation: Federation, tmp_path: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        tables = _tables(federation, server={"superlink": address})
        code, message = _refused(tmp_path, "--out", "out", tables=tables)
    assert code == 2 and f"{address} cannot be reached" in message and not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_run_is_left_alone(finished: Finished, federation: Federation) -> None:
    before = (finished.out / "run.toml").read_bytes()
    code, message = _refused(finished.out.parent, "--out", "out", tables=_tables(federation))
    assert code == 2 and "already holds a run" in message and "--resume out" in message
    assert (finished.out / "run.toml").read_bytes() == before


def test_an_agent_with_somebody_elses_key_does_not_start(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        write_certificates(tmp_path / name)
    tls = {"certificate": "own/server.pem", "key": "other/server.key", "authority": "own/ca.pem"}
    agent = SiteAgent(
        "north", tmp_path, agent_tables("north", "127.0.0.1:0", federation.model, COORDINATOR.public, tls=tls), _ROWS
    )
    monkeypatch.setattr(sys, "argv", ["consilium", "site", "agent", "--config", str(agent.config)])
    with pytest.raises(SystemExit) as ended:
        consilium.main()
    output = capsys.readouterr()
    assert ended.value.code == 2 and output.out == ""
    assert output.err.startswith("error: tls.key = ") and len(output.err.splitlines()) == 1


_ROWS = [{"text": "mild cough", "label": "routine", "hospital": "north"}]


# ---- afterwards -----------------------------------------------------------------------------------------------------


def test_each_agent_loaded_its_base_model_once_for_all_runs(finished: Finished, federation: Federation) -> None:
    for agent in federation.agents.values():
        assert finished.summary()["run_id"] in agent.charges()
        assert agent.base_model_loads() == 1
