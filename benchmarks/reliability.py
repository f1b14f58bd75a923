"""Kills a site at every named place and at random, and writes what came back: docs/reliability.md.

    python benchmarks/reliability.py [--check]

A site of a tiny model, so that the times are those of the agent and not of training. Each process is a fork of one that
has imported everything; what a start costs beyond that is measured apart, with the command itself. The tables stand
between ``<!-- NAME -->`` and ``<!-- /NAME -->``, the figures in results/reliability.json as well. ``--check`` kills at
every place once more, writes nothing, and fails if something else came back than the document says.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "integration"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "reliability"))

from comebacks import FIRST, RUN, SECOND, Comeback, come_back, foresee
from environment import RESULTS, environment
from kill_points import POINTS
from mortal_sites import ENVIRONMENT, REPOSITORY, SERVES, MortalSite, Parent, network_of, write_model
from site_books import Books
from soak import Tally, soak

from common.logs import LogFormat, set_up_logging

DOCUMENT = REPOSITORY / "docs" / "reliability.md"
Row = dict[str, Any]


@contextmanager
def sites(folder: Path) -> Iterator[Any]:
    """``make(name)``: a site in a folder of its own; and the process that all their agents are forks of."""
    model = write_model(folder / "model")
    network = network_of(model)
    with Parent() as parent:

        def make(name: str) -> MortalSite:
            return MortalSite(parent, folder / name, model, network)

        parent.rehearse(make("rehearsal"))
        yield make


def points(make: Any, repeats: int) -> list[Row]:
    """What became of a kill at each named place."""
    foreseen = foresee(make("foreseen-1"), FIRST) | foresee(make("foreseen-2"), SECOND)
    rows = []
    for number, point in enumerate(POINTS):
        done = [come_back(make(f"point-{number}-{repeat}"), point, foreseen) for repeat in range(repeats)]
        (row,) = {json.dumps(_row(point, one)) for one in done}
        times = {"serves": [one.serves for one in done], "answers": [one.answers for one in done]}
        rows.append({**json.loads(row), **times})
        print(f"{point}: {statistics.median(rows[-1]['answers']):.2f} s", file=sys.stderr, flush=True)
    return rows


def _row(point: str, done: Comeback) -> Row:
    return {
        "point": point,
        "found": _found(done.found),
        "back": _back(done.found),
        "charged": [len(done.found.charged), len(done.left.charged)],
        "released": [len(done.found.stored), len(done.left.stored)],
    }


def _found(books: Books) -> str:
    """What of the plan and its first round was on the disk."""
    facts = {
        f"plan {books.plans.get(RUN)}": RUN in books.plans,
        "round charged": (RUN, 1) in books.charged,
        "secret": bool(books.secrets),
        "release": (RUN, 1) in books.stored,
        "counter one behind": books.counted < books.sequence,
    }
    return ", ".join(name for name, holds in facts.items() if holds) or "nothing"


def _back(books: Books) -> str:
    if (RUN, 1) in books.stored:
        return "the stored release"
    return "the release of the kept secret" if (RUN, 1) in books.charged else "a first release"


def cold_starts(site: MortalSite, repeats: int) -> list[float]:
    """Seconds from ``consilium site agent`` until it serves, with all that Python imports."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        agent = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "consilium.py"), "site", "agent", "--config", str(site.config)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )
        with agent:
            assert agent.stderr is not None
            assert any(SERVES in line for line in agent.stderr)
            times.append(time.perf_counter() - started)
            agent.send_signal(signal.SIGTERM)
    return times


def point_table(rows: Sequence[Row]) -> str:
    """One line for each place."""
    lines = [
        "| The agent dies when | On its disk then | Asked again, it sends | Charged, released | Back after |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        counts = f"{row['charged'][0]}, {row['released'][0]} → {row['charged'][1]}, {row['released'][1]}"
        seconds = f"{statistics.median(row['answers']):.2f} s"
        lines.append(f"| {row['point']} | {row['found']} | {row['back']} | {counts} | {seconds} |")
    return "\n".join(lines)


def time_table(result: Row) -> str:
    """How long a site is away."""
    rows = result["points"]
    times = {
        "a fork of a process that has imported everything, until it serves": [t for row in rows for t in row["serves"]],
        "the same, until the round that was interrupted is released": [t for row in rows for t in row["answers"]],
        "`consilium site agent` itself, until it serves": result["cold_starts"],
        "in the soak, until it serves": result["soak"]["serves"],
    }
    lines = ["| From the start of the next process | Median | Longest | Measured |", "|---|---|---|---|"]
    for what, seconds in times.items():
        lines.append(f"| {what} | {statistics.median(seconds):.2f} s | {max(seconds):.2f} s | {len(seconds)} |")
    return "\n".join(lines)


def soak_table(result: Row) -> str:
    """What was killed, and what happened in between."""
    killed: Counter[str] = Counter()
    places = set()
    for where, count in result["kills"].items():
        command, _, place = where.partition(": ")
        if command != "agent":
            killed["a person's command: approve, reject, close or withdraw"] += count
        elif place not in POINTS:
            killed[f"an agent, {place}"] += count
        else:
            places.add(place)
            killed["an agent, at a named place"] += count
    rows = [f"| killed: {what} | {count} |" for what, count in sorted(killed.items())]
    rows.append(f"| **killed altogether, in {result['seconds']:.0f} s** | **{killed.total()}** |")
    rows.append(f"| named places among them | {len(places)} |")
    rows += [f"| {what} | {count} |" for what, count in sorted(result["events"].items())]
    return "\n".join(
        [f"| In the soak with seed {result['seed']} | |", "|---|---|", *rows, "| **violations** | **0** |"]
    )


def machine(result: Row) -> str:
    """Where this was measured."""
    where = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['cpu']}, {where['cores']} cores, one thread; Python {where['python']}, {versions}."


def write(result: Row) -> None:
    """Fills the document's blocks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = {
        "points": point_table(result["points"]),
        "times": time_table(result),
        "soak": soak_table(result["soak"]),
        "machine": machine(result),
    }
    for name, content in blocks.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert start and end, name
        text = before + start + content + "\n" + end + after
    DOCUMENT.write_text(text, encoding="utf-8")


def _told(rows: Sequence[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name not in ("serves", "answers")} for row in rows]


def main() -> int:
    """Measures and writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_up_logging(LogFormat.TEXT, verbose=False)
    file = RESULTS / "reliability.json"
    with tempfile.TemporaryDirectory() as scratch, sites(Path(scratch)) as make:
        if arguments.check:
            same = _told(points(make, 1)) == _told(json.loads(file.read_text(encoding="utf-8"))["points"])
            print("the document says what came back" if same else "something else came back: run this without --check")
            return 0 if same else 1
        rows = points(make, arguments.repeats)
        site = make("cold")
        started = time.perf_counter()
        tally: Tally = soak(arguments.kills, arguments.seed, site.parent, site.model, Path(scratch, "soak"), _progress)
        soaked = {"seed": arguments.seed, "seconds": time.perf_counter() - started, **vars(tally)}
        result = {
            "environment": environment(),
            "points": rows,
            "cold_starts": cold_starts(site, arguments.repeats),
            "soak": soaked,
        }
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write(result)
    return 0


def _progress(tally: Tally) -> None:
    print(f"{tally.killed} kills", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
