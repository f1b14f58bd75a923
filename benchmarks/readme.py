"""Writes the README's outputs and figures: every block between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    python benchmarks/readme.py [--demo-output FILE]

The outputs come from running the very commands; the demo (minutes) from a file with what ``make demo`` printed, kept as
it is where none is given. Figures come from benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import RESULTS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PLAN = "privacy plan --examples 1200 --batch 60 --rounds 10 --steps 4 --epsilon 3"
MISTYPED = (
    '[task]\nname = "sequence-classification"\nlabels = ["urgent", "routine"]\n[privacy]\nepsilom = 3\nnoise = "safe"\n'
)


def output(*arguments: str, cwd: Path | None = None) -> str:
    """What ``consilium`` prints, on either stream."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "consilium.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    return (done.stdout + done.stderr).strip()


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
    if (RESULTS / "medquad.md").exists():
        text = (RESULTS / "medquad.md").read_text(encoding="utf-8")
        parts.append(
            "Default recipe on medquad_qtype, nine natural sites, test split, mean ± spread "
            "over seeds "
            "(`benchmarks/medquad.py`; settings were chosen on validation data, "
            "and that choice is not charged to ε; measured before noise moved to the grid, "
            "see below for seed 0 since):\n\n" + text.partition("\n\n")[0]
        )
    if (RESULTS / "simulation.json").exists():
        result = json.loads((RESULTS / "simulation.json").read_text(encoding="utf-8"))
        where = f"{result['environment']['cpu']}, {result['environment']['cores']} cores"
        lines = [f"Simulation (`benchmarks/simulation.py`, {where}):\n"]
        for entry in result["overhead"]:
            ratio = entry["ratios"]
            lines.append(
                f"- wall time of a client-round over a bare loop of the same steps, {entry['mechanism']}: median "
                f"{ratio['median']:.2f} (from {ratio['min']:.2f} to {ratio['max']:.2f}, {ratio['n']} rounds)"
            )
        peak = ", ".join(f"{entry['sites']} sites {entry['peak_memory_mib']} MiB" for entry in result["memory"])
        lines.append(f"- peak memory with the same 3,000 rows: {peak}")
        parts.append("\n".join(lines))
    if (RESULTS / "deployment.json").exists():
        result = json.loads((RESULTS / "deployment.json").read_text(encoding="utf-8"))
        parts.append(str(result["summary"]))
    if (RESULTS / "privacy_unit.md").exists():
        text = (RESULTS / "privacy_unit.md").read_text(encoding="utf-8")
        parts.append(
            "The same recipe by example and with a larger privacy unit, the subject of a text, seed 0 alone "
            "(`benchmarks/privacy_unit.py`):\n\n" + text.partition("\n\n")[0]
        )
    if (RESULTS / "dp_step.json").exists():
        parts.append(_dp_steps(json.loads((RESULTS / "dp_step.json").read_text(encoding="utf-8"))))
    return "\n\n".join(parts) or "Nothing yet."


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


def main() -> None:
    """Fills the blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo-output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mine.toml").write_text(MISTYPED, encoding="utf-8")
        error = output("simulate", "--config", "mine.toml", cwd=Path(folder))
    blocks = {"plan": _fenced(output(*PLAN.split())), "error": _fenced(error), "measured": measured()}
    blocks["audit"] = _fenced(output("privacy", "audit", "--config", "examples/medquad_qtype.toml", "--quick"))
    if arguments.demo_output:
        blocks["demo"] = _fenced(shortened(arguments.demo_output.read_text(encoding="utf-8")))
    text = README.read_text(encoding="utf-8")
    for name, content in blocks.items():
        pattern = rf"<!-- {name} -->\n.*?<!-- /{name} -->"
        text = re.sub(pattern, lambda _, n=name, c=content: f"<!-- {n} -->\n{c}\n<!-- /{n} -->", text, flags=re.DOTALL)
    README.write_text(text, encoding="utf-8")


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    main()
