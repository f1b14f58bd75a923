"""Seconds per round of a deployment, against a Flower app that does nothing, both in one deployment and in turns.

    python benchmarks/deployment.py

One SuperLink with TLS and node keys, SuperNodes and site agents on this machine. The empty app sends an empty message
to every node and waits for all replies, looking for them as often as the coordinator does; its relay imports Flower
alone. A round is the time from one finished round to the next, so that evaluation and checkpoints count; the first of
a run is left out for both. Results: results/deployment.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

# The tests' harness first: its module has this file's name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integration"))

import torch
from agents import ENVIRONMENT, Federation
from deployment import Deployment
from environment import RESULTS, environment
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from common.config import RunConfig
from common.toml_settings import validate
from server.follow import run_deployment
from server.submission import control

WORDS = ("chest", "pain", "fever", "cough", "rash", "fall", "cut", "mild", "severe", "today")
LABELS = ("cardiac", "general", "trauma")
EMPTY_SETTINGS = """
[project]
name = "empty"
version = "1.0.0"
description = "An app that does nothing"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "empty:app"
clientapp = "relay:app"
[tool.flwr.app.config]
rounds = 1
times = ""
"""
EMPTY_SERVER = """
import time
from flwr.app import RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    with open(context.run_config["times"], "w") as stream:
        for _ in range(context.run_config["rounds"]):
            nodes = list(grid.get_node_ids())
            messages = [grid.create_message(RecordDict(), "train", node, group_id="") for node in nodes]
            waiting = set(grid.push_messages(messages))
            while waiting:
                waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(list(waiting))}
                if waiting:
                    time.sleep(0.1)
            stream.write(f"{time.monotonic()}\\n")
            stream.flush()
"""
EMPTY_RELAY = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""


class Stopwatch:
    """Notes when each round is finished."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def round(self, record: dict[str, Any]) -> None:
        """Called by ``run_deployment`` when it finds a new record."""
        self.times.append(time.monotonic())


def write_model(folder: Path) -> Path:
    """A BERT of two layers and hidden size 32 with random weights: what is measured is everything but training."""
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **shape)).save_pretrained(folder)
    return folder


def write_data(folder: Path, sites: tuple[str, ...], rows: int = 64) -> Path:
    """``rows`` texts per site, and a validation file."""
    folder.mkdir()
    for name, hospitals in (("train", sites), ("validation", ("held-out",))):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "label", "hospital"))
            for hospital in hospitals:
                for row in range(rows):
                    text = " ".join(WORDS[(row * step + step) % len(WORDS)] for step in (1, 2, 3))
                    writer.writerow((text, LABELS[row % len(LABELS)], hospital))
    return folder


def empty_rounds(federation: Federation, scratch: Path, rounds: int) -> list[float]:
    """Seconds of each round of the empty app but the first."""
    app = scratch / "empty-app"
    app.mkdir(exist_ok=True)
    for name, text in (("pyproject.toml", EMPTY_SETTINGS), ("empty.py", EMPTY_SERVER), ("relay.py", EMPTY_RELAY)):
        (app / name).write_text(text, encoding="utf-8")
    times = scratch / "times"
    (scratch / "settings.toml").write_text(f'rounds = {rounds}\ntimes = "{times}"\n', encoding="utf-8")
    superlink = federation.deployment.superlink
    arguments = ("run", str(app), "consilium", "--run-config", str(scratch / "settings.toml"))
    run = int(control(superlink, *arguments)["run-id"])
    status = federation.deployment.wait_for_run(run, 60.0 * rounds)
    if status != "finished:completed":
        raise SystemExit(federation.deployment.run_log(run))
    return _between([float(line) for line in times.read_text().split()])


def our_rounds(federation: Federation, scratch: Path, rounds: int, name: str) -> list[float]:
    """Seconds of each round of a run with the tiny model but the first."""
    superlink = federation.deployment.superlink
    sites = len(federation.agents)
    tables = {
        "run": {"name": "benchmark"},
        "model": {"name": str(federation.model)},
        "task": {"labels": LABELS, "max_length": 16},
        "server": {
            "superlink": superlink.address,
            "root_certificates": superlink.root_certificates,
            "signing_key": federation.key,
            "min_sites": sites,
            "min_replies": sites,
        },
        "evaluation": {"path": str(federation.data), "test": ""},
        "phase": [{"name": "lora", "rounds": rounds, "sample_rate": 0.5, "train": ["head", "lora"]}],
    }
    watch: Any = Stopwatch()
    run_deployment(validate(RunConfig, tables, "benchmark"), scratch / name, False, watch)
    return _between(watch.times[1:])  # the first is of the evaluation before round 1


def _between(times: list[float]) -> list[float]:
    return [round(after - before, 3) for before, after in pairwise(times)]


def summary(result: dict[str, Any]) -> str:
    """One paragraph for the README."""
    where = f"{result['environment']['cpu']}, {result['environment']['cores']} cores"
    rounds = sum(len(turn["consilium"]) for turn in result["seconds"])
    return (
        f"Deployment (`benchmarks/deployment.py`, {where}): SuperLink with TLS and node keys, {result['sites']} "
        f"SuperNodes and site agents on one machine. Median seconds per round: "
        f"{result['median_seconds']['consilium']:.1f}, training a tiny model, evaluation and checkpoint "
        f"included; an empty Flower round {result['median_seconds']['empty']:.1f}. Ratio {result['ratio']:.2f} "
        f"(by turn {', '.join(f'{ratio:.2f}' for ratio in result['ratio_by_turn'])}; {rounds} rounds of each)."
    )


def main() -> None:
    """Runs both apps in turns and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each run; the first is not counted")
    parser.add_argument("--turns", type=int, default=3, help="runs of each app")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "deployment.json")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    load_before = os.getloadavg()
    sites = tuple(f"site-{number}" for number in range(1, arguments.sites + 1))
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data, model = write_data(scratch / "data", sites), write_model(scratch / "model")
        with Federation(Deployment(sites), data, model) as federation:
            for turn in range(arguments.turns):
                empty = empty_rounds(federation, scratch, arguments.rounds)
                ours = our_rounds(federation, scratch, arguments.rounds, f"out-{turn}")
                turns.append({"empty": empty, "consilium": ours})
                print(turns[-1], flush=True)
    ratios = [statistics.median(turn["consilium"]) / statistics.median(turn["empty"]) for turn in turns]
    medians = {name: statistics.median(value for turn in turns for value in turn[name]) for name in turns[0]}
    result = {
        "what": "seconds from one finished round to the next; training a tiny model is part of Consilium's",
        "sites": arguments.sites,
        "median_seconds": {name: round(value, 3) for name, value in medians.items()},
        "ratio": round(medians["consilium"] / medians["empty"], 3),
        "ratio_by_turn": [round(ratio, 3) for ratio in ratios],
        "seconds": turns,
        "load_average_before": [round(value, 2) for value in load_before],
        "environment": environment(),
    }
    result["summary"] = summary(result)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"ratio {result['ratio']} (by turn {result['ratio_by_turn']}), median seconds {result['median_seconds']}")


if __name__ == "__main__":
    main()
