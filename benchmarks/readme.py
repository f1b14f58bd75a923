"""Writes the README's outputs and figures: every block between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    python benchmarks/readme.py [--demo-output FILE] [--only NAME ...]

The outputs come from running the very commands; the demo (minutes) from a file with what ``make demo`` printed, kept as
it is where none is given. The officer's example is a site in a temporary folder: the demonstration's notes of one
hospital, real commands, and between them what an agent does when a coordinator shows a plan and asks for three rounds.
Figures come from benchmarks/results/.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import RESULTS

from client.announce import announce
from client.assemble import build_site
from client.config import read_site_config
from common.code import code_digest
from common.config import RunConfig
from common.messages import DescribeRequest, Release, SiteDescription
from common.plan import Plan, plan_of
from common.requests import RoundRequest
from common.signing import PLAN as PLAN_PURPOSE
from common.signing import SigningKey
from common.toml_settings import validate
from server.evaluation import held_out
from server.prepare import initial_adapter, resident_model
from simulations.demo import LABELS, write_demo_data

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PLAN = "privacy plan --examples 1200 --batch 60 --rounds 10 --steps 4 --epsilon 3"
MISTYPED = (
    '[task]\nname = "sequence-classification"\nlabels = ["urgent", "routine"]\n[privacy]\nepsilom = 3\nnoise = "safe"\n'
)
SITE = "north-quay"
INIT = f"site init --name {SITE} --data notes.csv --public-size 400 --unit patient --privacy-unit patient_id"
TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00")
ROUNDS = 3
"""How many rounds of the example's plan the coordinator asks for."""


def output(*arguments: str, cwd: Path | None = None) -> str:
    """What ``consilium`` prints, on either stream."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "consilium.py"), *arguments]
    done = subprocess.run(command, cwd=cwd or ROOT, capture_output=True, text=True, env=environment)
    return (done.stdout + done.stderr).strip("\n").rstrip()


def shortened(text: str, head: int = 9, tail: int = 4) -> str:
    """The demo's output with the middle of its table of rounds left out."""
    lines = text.rstrip().splitlines()
    rows = [number for number, line in enumerate(lines) if re.match(r"│ +\d+ (\*)? *│", line)]
    cut = rows[head - 1 : len(rows) - tail]
    kept = [line for number, line in enumerate(lines) if number not in cut[1:]]
    return "\n".join("│   …" if cut and line == lines[cut[0]] else line for line in kept)


def measured() -> str:
    """The committed results, one paragraph each."""
    parts = []
    if (RESULTS / "utility.md").exists():
        text = (RESULTS / "utility.md").read_text(encoding="utf-8")
        parts.append(
            "Federated on medquad_qtype, nine natural sites, test split, mean ± spread over seeds "
            "(`benchmarks/utility.py`; settings were chosen on the server's validation data, and that choice is not "
            "charged to ε; rows of a named algorithm show what its LoRA phase ended with, which the default recipe "
            "keeps only where it gained; DECISIONS.md, 67 and 76):\n\n" + text.rpartition("\n\n")[0]
        )
    if (RESULTS / "simulation.json").exists():
        parts.append(_simulation(json.loads((RESULTS / "simulation.json").read_text(encoding="utf-8"))["rows"]))
    if (RESULTS / "frozen_linear.json").exists():
        parts.append(_frozen_linear(json.loads((RESULTS / "frozen_linear.json").read_text(encoding="utf-8"))))
    if (RESULTS / "deployment.json").exists():
        result = json.loads((RESULTS / "deployment.json").read_text(encoding="utf-8"))
        parts.append(str(result["summary"]))
    if (RESULTS / "privacy_unit.md").exists():
        text = (RESULTS / "privacy_unit.md").read_text(encoding="utf-8")
        parts.append(
            "The recipe before the feature map (head on the last layer's states, clip norm 0.5, learning rate 8, "
            "momentum 0.9) by example and with a larger privacy unit, the subject of a text, seed 0 alone "
            "(`benchmarks/privacy_unit.py`):\n\n" + text.partition("\n\n")[0]
        )
    if (RESULTS / "dp_step.json").exists():
        parts.append(_dp_steps(json.loads((RESULTS / "dp_step.json").read_text(encoding="utf-8"))))
    if (RESULTS / "prefix_cache.json").exists():
        parts.append(_prefix_cache(json.loads((RESULTS / "prefix_cache.json").read_text(encoding="utf-8"))["cells"]))
    if (RESULTS / "bandwidth.md").exists():
        text = (RESULTS / "bandwidth.md").read_text(encoding="utf-8")
        parts.append(
            "KiB that one site receives and sends in a round, by algorithm and number format "
            "(`benchmarks/bandwidth.py`), and how small a part of all of A, B and head in fp32 that is:\n\n"
            + text.partition("\n\nKiB")[0]
        )
    if (RESULTS / "robustness.md").exists():
        text = (RESULTS / "robustness.md").read_text(encoding="utf-8")
        parts.append(
            "Hostile sites (`benchmarks/robustness.py`, where the attacks are described; a head at ε = 8). "
            + text.partition("\n\nAccuracy / macro-F1 of the model kept")[0]
        )
    return "\n\n".join(parts) or "Nothing yet."


def _prefix_cache(cells: dict[str, Any]) -> str:
    """What the cache of frozen activations saves, cell by cell."""
    lines = [
        "A local round with the frozen-prefix cache against one with adapters in all six layers "
        "(`benchmarks/prefix_cache.py`, random models of MiniLM's width, one thread, CPU time; median and range of the "
        "ratios):\n",
        "| model, adapted layers, mechanism | times faster | layers saved | examples/s | pairs |",
        "|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        ratio = cell["all_over_cached"]["cpu"]
        speed = cell["examples_per_second"]
        lines.append(
            f"| {name.replace('-', ', ', 2)} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | "
            f"{cell['layers_ratio']:g} | {speed['all']:g} → {speed['cached']:g} | {ratio['n']} |"
        )
    return "\n".join(lines)


def _simulation(rows: list[dict[str, Any]]) -> str:
    """What benchmarks/simulation.py has measured, as Markdown."""
    where = rows[0]["environment"]
    lines = [f"Simulation (`benchmarks/simulation.py`, {where['cpu']}, {where['cores']} cores):\n"]
    for row in rows:
        stage, cell = row["stage"], row["cell"]
        if stage == "overhead":
            same, plain = (row[f"over_{loop}"]["rounds"] for loop in ("same", "plain"))
            lines.append(
                f"- core-seconds of a round of 8 steps × batch 16 ({cell}): {same['median']:.3f} of a bare loop over "
                f"the same batches with the same linear maps, {plain['median']:.2f} of a loop of plain torch that pads "
                "each step to its longest example"
            )
        elif stage == "little":
            extra = row["over_same"]["extra_core_ms_per_client_round"]
            lines.append(
                f"- beyond the bare loop, per client-round of 1 step × batch 2 ({cell}): {extra['median']:.1f} ms of "
                f"core time (from {extra['min']:.1f} to {extra['max']:.1f}, {extra['n']} rounds)"
            )
        elif stage == "prefix":
            lines.append(
                f"- top 2 of 6 layers, frozen-prefix cache ({cell}): {row['faster_than_plain']:.2f} × as fast "
                "as a loop of plain torch with all six adapted"
            )
        elif stage == "cores":
            lines.append(f"- two workers on two cores ({cell}): {row['faster']['median']:.2f} × as fast as one")
        elif stage == "start":
            seconds = {cache: row[cache]["seconds_to_first_message"] for cache in ("empty_cache", "filled_cache")}
            first = " and ".join(
                f"{one['median']:.1f} s ({cache.replace('_', ' ')}, {one['min']:.1f} to {one['max']:.1f})"
                for cache, one in seconds.items()
            )
            lines.append(f"- from the loaded model to the first round, base evaluation aside: {first}")
        elif stage == "sites":
            lines.append(
                f"- {row['sites']:,} sites, {row['sites_made']} of them made: first round after "
                f"{row['seconds_to_first_message']:.1f} s, {row['peak_memory_mib']} MiB at most"
            )
    return "\n".join(lines)


def _frozen_linear(found: dict[str, Any]) -> str:
    """What benchmarks/frozen_linear.py has measured, as one sentence."""
    where = found["environment"]
    shares = {
        what: sorted(row["onednn_over_mkl"]["median"] for row in found["rows"] if row["what"] == what)
        for what in ("step", "forward")
    }
    return (
        f"The base's frozen linear maps by oneDNN (`benchmarks/frozen_linear.py`, {where['cpu']}, one thread): a LoRA "
        f"training step takes {shares['step'][0]:.2f} to {shares['step'][-1]:.2f} of the time that it takes with MKL, "
        f"a forward pass {shares['forward'][0]:.2f} to {shares['forward'][-1]:.2f} (medians of {found['turns']} turns, "
        "three shapes of batch)."
    )


def _dp_steps(cells: dict[str, Any]) -> str:
    """A private step against a plain one, cell by cell."""
    arms = ("fused", "secure", "hooks", "ghost")
    where = next(iter(cells.values()))["environment"]
    lines = [
        f"A DP step over the same step without privacy (`benchmarks/dp_step.py`, MiniLM shape, rank 8, {where['cpu']}, "
        "one thread): median of the ratios of CPU time, in brackets the upper 95 % bound of that median, and peak "
        "memory of tensors for the secure engine. *fused* and *secure* are Consilium's, with fast and secure noise; "
        "*hooks* and *ghost* are Opacus's.\n",
        "| batch, length, adapted | " + " | ".join(arms) + " | memory | steps |",
        "|---" * (len(arms) + 3) + "|",
    ]
    for name, cell in cells.items():
        times = [cell["time"][arm]["cpu"] for arm in arms]
        shown = " | ".join(f"{time['median']:.2f} ({time['upper']:.2f})" for time in times)
        memory = cell["memory"]["secure"]["tensors"]["ratio"]
        lines.append(f"| {name.replace('-', ', ')} | {shown} | {memory:.2f} | {cell['pairs']} |")
    return "\n".join(lines)


def error() -> str:
    """What is said of a file with two mistakes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mine.toml").write_text(MISTYPED, encoding="utf-8")
        return output("simulate", "--config", "mine.toml", cwd=Path(folder))


def officer() -> str:
    """What a data-protection officer sees, from a new site to a patient who withdraws."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        said: list[str] = []

        def told(command: str) -> None:
            shown = output(*shlex.split(command), cwd=folder).replace(f"{folder}/", "")
            said.append(f"$ consilium {command}\n{TIME.sub('TIME', shown)}\n")

        _write_notes(folder)
        told(INIT)
        key = SigningKey.fresh()
        _settle(folder / "site.toml", key)
        said.append("# Both are filled in. Does the file fit the data, and what will the coordinator see?\n")
        told(f'site check --labels "{",".join(LABELS)}"')
        plan = _visit(folder, key, rounds=0).digest()
        said.append("# The agent runs, and a coordinator has shown a plan.\n")
        told("site pending")
        told(f"site show {plan[:12]}")
        told(f"site approve {plan[:12]}")
        _visit(folder, key, ROUNDS)
        said.append(f"# {ROUNDS} rounds later.\n")
        told("site ledger")
        head = output("site", "audit-log", "head", cwd=folder)
        (folder / "kept.json").write_text(head + "\n", encoding="utf-8")
        said.append("$ consilium site audit-log head > kept.json    # to be kept elsewhere\n")
        told("site audit-log verify --head kept.json")
        told("site audit-log show --last 2")
        said.append("# A patient withdraws.\n")
        told("site withdraw --data default --unit P0042 --dry-run")
        return "\n".join(said).rstrip()


def _write_notes(folder: Path) -> None:
    """The notes of one hospital that does not exist; every third patient has one, the others have two."""
    with (write_demo_data(folder / "demo") / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["hospital"] == SITE]
    with (folder / "notes.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("patient_id", "text", "label"))
        writer.writerows((f"P{2 * number // 3:04}", row["text"], row["label"]) for number, row in enumerate(rows))


def _settle(site_toml: Path, key: SigningKey) -> None:
    """What a person fills in. The relay's user is not looked at here, since no relay takes part."""
    text = site_toml.read_text(encoding="utf-8")
    for before, after in (
        ("coordinator_keys = []", f'coordinator_keys = ["{key.public}"]'),
        ("#relay_user =", "relay_user ="),
    ):
        assert before in text, before
        text = text.replace(before, after)
    site_toml.write_text(text, encoding="utf-8")


def _visit(folder: Path, key: SigningKey, rounds: int) -> Plan:
    """An agent starts, is shown the plan, serves so many rounds and ends."""
    run = validate(
        RunConfig,
        {
            "task": {"name": "sequence-classification", "labels": LABELS},
            "lora": {"layers": 2},
            "privacy": {"epsilon": 3.0, "unit": "patient"},
        },
        "the example",
    )
    model = resident_model(run)
    run = run.model_copy(update={"task": model.task.settings})
    plan = plan_of(run, "triage/2", model.base.digest, model.spec.digest(), code_digest())
    config = read_site_config(folder / "site.toml")
    site, _ = build_site(config)
    with site.ledger.serve_alone():
        announce(site, config)
        signature = key.sign(PLAN_PURPOSE, plan.digest().encode())
        stand = site.describe(DescribeRequest(plan.run_id, plan.canonical(), code_digest(), signature))
        assert isinstance(stand, SiteDescription) and stand.refusal is None, stand
        with tempfile.TemporaryDirectory() as own:  # the coordinator's texts
            write_demo_data(Path(own))
            adapter = initial_adapter(run, model, held_out(model, own, "validation", {}, 200).examples)
        for number in range(1, rounds + 1):
            reply = site.train(RoundRequest.of(plan, model, number, adapter).to({}))
            assert isinstance(reply, Release), reply
            adapter = {**adapter, **{name: adapter[name] + change for name, change in reply.update.items()}}
    site.ledger.close()
    return plan


def main() -> None:
    """Fills the blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-output", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these blocks alone")
    arguments = parser.parse_args()
    blocks: dict[str, Callable[[], str]] = {
        "plan": lambda: _fenced(output(*PLAN.split())),
        "error": lambda: _fenced(error()),
        "measured": measured,
        "officer": lambda: _fenced(officer()),
        "audit": lambda: _fenced(output("privacy", "audit", "--config", "examples/medquad_qtype.toml", "--quick")),
    }
    if arguments.demo_output:
        printed = arguments.demo_output.read_text(encoding="utf-8")
        blocks["demo"] = lambda: _fenced(shortened(printed))
    text = README.read_text(encoding="utf-8")
    for name in arguments.only or blocks:
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{blocks[name]()}\n{end}{rest.partition(end)[2]}"
    README.write_text(text, encoding="utf-8")


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    main()
