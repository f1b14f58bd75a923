"""Random kills of sites at work: every death is followed by a look at the disk, and every site is brought to its end.

    make soak    (python tests/reliability/soak.py --kills 200 --seed 0)

A site works on several plans at the same time, each of which a person approves, rejects or closes; a coordinator shows
plans, asks for rounds, asks again, and sometimes for something else; now and then somebody's row is withdrawn. Agents,
and the persons' commands, die at a random moment or at a random one of the named places. What is chosen depends on the
seed alone; at which instruction a random moment falls does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from comebacks import newest_head
from kill_points import DESCRIBE, FIRST_START, PERSON, TRAIN
from mortal_sites import KILLED, SERVES, MortalSite, Parent, network_of, write_model
from site_books import tells_all
from small_sites import request_for

from common.logs import LogFormat, set_up_logging
from common.messages import Pending, Refusal, RefusalReason, Release
from common.plan import Plan

KILLS_OF_A_SITE = 25
PLANS = 10
ROUNDS = 3
MOST_ATTEMPTS = 3
"""Of a command to withdraw, before it is let alone."""
MOST_ACTIONS = 12
"""Of the coordinator and the persons, in one life of an agent."""
LIFETIME = 30.0
"""Lifetime ε of a site: some of its plans do not fit any more."""
PLANS_END = (RefusalReason.CLOSED, RefusalReason.POLICY, RefusalReason.BUDGET)
ROUNDS_END = (RefusalReason.OUT_OF_ORDER, RefusalReason.REQUEST_CHANGED)


@dataclass
class Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    serves: list[float] = field(default_factory=list)
    """Seconds from the start of a process after a kill until it serves."""

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.kills + other.kills, self.events + other.events, self.serves + other.serves)

    @property
    def killed(self) -> int:
        """How many processes were killed."""
        return sum(self.kills.values())


class SoakedSite:
    """One site, its plans, and all that happens to it.

    Args:
        dice: decides everything.
        pace: seconds in which an agent starts and serves a plan of three rounds.
    """

    def __init__(self, site: MortalSite, dice: random.Random, pace: float) -> None:
        self.site, self.dice, self.tally = site, dice, Tally()
        self.pace = pace
        self.plans = [site.plan(f"run-{number}") for number in range(PLANS)]
        self.next_round = dict.fromkeys((plan.run_id for plan in self.plans), 1)
        self.ended: set[str] = set()

    def live(self) -> None:
        """One life of an agent: it dies at one of the places, at a random moment, or when it has done enough."""
        places = [*DESCRIBE, *TRAIN] if self.site.state.exists() else [*FIRST_START]
        point = self.dice.choice(places) if self.dice.random() < 0.6 else None
        mortality = {"point": point, "nth": self.dice.choice([1, 1, 1, 2])} if point else {}
        how = signal.SIGTERM if self.dice.random() < 0.1 else signal.SIGKILL
        killer = threading.Timer(self.dice.uniform(0, self.pace), lambda: life.strike(how))
        started = time.perf_counter()
        life = self.site.command("agent", **mortality)
        if not point:
            killer.start()
        if life.until(SERVES):
            self.tally.serves.append(time.perf_counter() - started)
        for _ in range(MOST_ACTIONS):
            if not life.alive:
                break
            self.act()
        killer.cancel()
        where = "between two calls" if life.alive else point or "a random moment"
        code = life.end(how)
        assert code in (0, KILLED, -signal.SIGTERM), f"the site does not come back:\n{life.log}"
        if code == KILLED:
            self.tally.kills[f"agent: {where}"] += 1
        self.site.books()

    def act(self) -> None:
        """The coordinator or a person does something."""
        going_on = [plan for plan in self.plans if plan.run_id not in self.ended]
        plan = self.dice.choice(going_on[:2] if going_on and self.dice.random() < 0.9 else self.plans)
        act = self.dice.choices([self.show, self.ask, self.ask_again, self.ask_otherwise, self.decide], [3, 8, 2, 2, 4])
        act[0](plan)

    def show(self, plan: Plan) -> None:
        """Shows a plan, with the last head that was seen."""
        described = self.site.describe(plan, witness=newest_head(self.site))
        if described is not None:
            assert described.refusal in (None, *PLANS_END), described
            self.tally.events["plans shown"] += 1

    def ask(self, plan: Plan) -> None:
        """Asks for the plan's next round."""
        self._ask(plan, self.next_round[plan.run_id])

    def ask_again(self, plan: Plan) -> None:
        """Asks for a round that was released."""
        if self.next_round[plan.run_id] > 1 and self._ask(plan, self.dice.randrange(1, self.next_round[plan.run_id])):
            self.tally.events["releases received once more"] += 1

    def _ask(self, plan: Plan, round: int) -> bool:
        reply = self.site.train(plan, min(round, ROUNDS))
        if isinstance(reply, Release):
            self.tally.events["releases received"] += 1
            self.next_round[plan.run_id] = max(self.next_round[plan.run_id], reply.round + 1)
        elif isinstance(reply, Refusal):
            assert reply.reason in (*PLANS_END, RefusalReason.UNKNOWN_PLAN), reply
            self.ended |= {plan.run_id} if reply.reason in PLANS_END else set()
        if self.next_round[plan.run_id] > ROUNDS:
            self.ended.add(plan.run_id)
        return isinstance(reply, Release)

    def ask_otherwise(self, plan: Plan) -> None:
        """Asks for a round that was asked for before, with other bytes."""
        done = [round for run, round in self.site.auditor.received if run == plan.run_id]
        if not done:
            return
        request = request_for(plan, self.site.adapter, self.dice.choice(done))
        changed = {name: array + 1 for name, array in request.adapter.items()}
        altered = replace(request, adapter=changed, adapter_digest="")
        reply = self.site.try_to(lambda: self.site.ask(altered))
        if reply is not None:
            assert isinstance(reply, Refusal) and reply.reason in (*PLANS_END, *ROUNDS_END), reply
            self.tally.events["altered requests refused"] += 1

    def decide(self, plan: Plan) -> None:
        """A person approves, seldom rejects, or closes a plan; the command may be killed."""
        command = self.dice.choices(["approve", "reject", "close"], [10, 1, 1])[0]
        mortality: dict[str, Any] = {"point": self.dice.choice(list(PERSON))} if self.dice.random() < 0.3 else {}
        life = self.site.command(command, plan.digest(), **mortality)
        code = life.end()
        assert code in (0, 2, KILLED) and "Traceback" not in life.log, life.log
        if code == KILLED:
            self.tally.kills[f"{command}: {mortality['point']}"] += 1
        self.tally.events[f"{command} by a person"] += code == 0

    def withdraw(self) -> None:
        """Somebody's row goes; the command is killed at random moments, and given again until it is done."""
        data = self.site.folder / "train.csv"
        rows = len(data.read_text().splitlines())
        for attempt in range(MOST_ATTEMPTS + 1):
            life = self.site.command("withdraw", "--data", "default", "--row", "0", "--yes")
            killer = threading.Timer(self.dice.uniform(0, self.pace / 3), life.strike, [signal.SIGKILL])
            if attempt < MOST_ATTEMPTS:
                killer.start()
            code = life.end()
            killer.cancel()
            self.site.books()
            assert code in (0, KILLED), life.log
            self.tally.kills["withdraw: a random moment"] += code == KILLED
            left = len(data.read_text().splitlines())
            if code == 0 or (left < rows and not (self.site.state / "withdrawal.json").exists()):
                break  # a person would see in the audit log that it is done
        assert left == rows - 1
        self.tally.events["rows withdrawn"] += 1

    def finish(self) -> None:
        """Nobody is killed any more: every plan comes to its end, and the books agree with all that was received."""
        with self.site.serving():
            for plan in self.plans:
                self.show(plan)
                for round in range(1, ROUNDS + 1):
                    reply = self.site.train(plan, round)
                    assert isinstance(reply, Release | Pending) or (
                        isinstance(reply, Refusal) and reply.reason in (*PLANS_END, RefusalReason.OUT_OF_ORDER)
                    ), f"{plan.run_id}, round {round}: {reply}"
        books = self.site.books(killed=False)
        assert not books.secrets, "secrets are left"
        tells_all(books)
        self.tally.events["plans that were approved"] += len({run for run, _ in books.reserved})
        self.tally.events["rounds that were charged"] += len(books.charged)
        self.tally.events["rounds whose release was received"] += len(self.site.auditor.received)


@dataclass(frozen=True)
class Violation(Exception):
    """What must hold did not."""

    seed: int
    number: int
    folder: Path
    cause: BaseException


def soak(
    kills: int, seed: int, parent: Parent, model: Path, folder: Path, progress: Callable[[Tally], object] = id
) -> Tally:
    """Sites are killed until so many kills are counted.

    Raises:
        Violation: something did not hold.
    """
    network = network_of(model)
    pace = pace_of(MortalSite(parent, folder / "pace", model, network))
    total = Tally()
    while total.killed < kills:
        number = total.events["sites"]
        home = folder / f"site-{number}"
        dice = random.Random(f"{seed} {number}")
        approval = dice.choice(["manual", "automatic"])
        sections = {"policy": {"approval": approval}, "population": {"lifetime_epsilon": LIFETIME}}
        site = SoakedSite(MortalSite(parent, home, model, network, sections, patience=2.0), dice, pace)
        until = min(KILLS_OF_A_SITE, kills - total.killed)
        try:
            while site.tally.killed < until:
                site.live()
                if dice.random() < 0.03 and site.site.state.exists():
                    site.withdraw()
                progress(total + site.tally)
            site.finish()
        except (AssertionError, TimeoutError) as cause:
            raise Violation(seed, number, home, cause) from cause
        total = total + site.tally
        total.events["sites"] += 1
    return total


def pace_of(site: MortalSite) -> float:
    """Seconds in which an agent starts and serves a plan of three rounds."""
    plan, started = site.plan(), time.perf_counter()
    with site.serving():
        site.describe(plan)
        for round in range(1, ROUNDS + 1):
            site.release(plan, round)
        return time.perf_counter() - started


def main() -> int:
    """Soaks, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    set_up_logging(LogFormat.TEXT, verbose=False)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    started = time.monotonic()

    def progress(tally: Tally) -> None:
        seconds = time.monotonic() - started
        said = (
            f"{tally.killed} of {arguments.kills} kills, {tally.events['releases received']} releases, {seconds:.0f} s"
        )
        print(said, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    try:
        with Parent() as parent:
            model = write_model(folder / "model")
            parent.rehearse(MortalSite(parent, folder / "rehearsal", model, network_of(model)))
            tally = soak(arguments.kills, arguments.seed, parent, model, folder, progress)
    except Violation as violation:
        traceback.print_exception(violation.cause)
        print(
            f"\nVIOLATION at site {violation.number}; its folder is kept: {violation.folder}\n"
            f"again: make soak SEED={arguments.seed} KILLS={arguments.kills}",
            file=sys.stderr,
        )
        return 1
    shutil.rmtree(folder)
    print("\n".join(["", *table(tally), f"seed {arguments.seed}, {time.monotonic() - started:.0f} s, no violation"]))
    return 0


def table(tally: Tally) -> list[str]:
    """What happened, as lines."""
    kills = [f"{count:6}  {where}" for where, count in sorted(tally.kills.items())]
    events = [f"{count:6}  {what}" for what, count in sorted(tally.events.items())]
    median, longest = statistics.median(tally.serves), max(tally.serves)
    return [
        *("kills", *kills, f"{tally.killed:6}  altogether", "", "between them", *events, ""),
        f"from the start of a process until it serves: median {median:.2f} s, at most {longest:.2f} s",
    ]


if __name__ == "__main__":
    sys.exit(main())
