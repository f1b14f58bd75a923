"""The whole audit: which parts run, how thoroughly, and what they found."""

from __future__ import annotations

import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from client.privacy.audit.canaries import Estimate, canary_runs
from client.privacy.audit.ledger_steps import ledger_steps
from client.privacy.audit.noise import measure
from client.privacy.audit.probe import Folders, Probe, Subject, closing
from client.privacy.audit.replay import replay
from client.privacy.audit.sampling import canary_subject, sampling
from client.privacy.audit.subjects import canary_model
from client.privacy.audit.verdicts import Verdict
from common.config import RunConfig
from common.errors import ConfigError
from common.examples import Examples

PARTS = ("replay", "noise", "sampling", "canaries", "ledger")


@dataclass(frozen=True)
class Thoroughness:
    """How much is executed."""

    noise_values: int
    """Of each phase, at least."""
    sampled_rounds: int
    """Of each phase."""
    canary_runs: tuple[int, int]
    """At least and at most; each has a thousand canaries and goes through all rounds."""
    canary_steps: int
    """Of all canary runs together, at most."""


QUICK = Thoroughness(noise_values=20_000, sampled_rounds=16, canary_runs=(1, 16), canary_steps=4_000)
FULL = Thoroughness(noise_values=400_000, sampled_rounds=48, canary_runs=(8, 32), canary_steps=30_000)


@dataclass(frozen=True)
class Audit:
    """What was found."""

    verdicts: tuple[Verdict, ...]
    estimate: Estimate | None
    seed: int
    """Of the coins and of the known keys in replays; noise came from the operating system."""
    public_size: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(verdict.held for verdict in self.verdicts)

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """The checks that do not hold."""
        return tuple(verdict for verdict in self.verdicts if not verdict.held)


def audit(
    config: RunConfig,
    public_size: int,
    how: Thoroughness = FULL,
    seed: int | None = None,
    parts: Collection[str] = PARTS,
    started: Callable[[str], None] = lambda part: None,
    done: Callable[[], None] = lambda: None,
) -> Audit:
    """Audits the installed engine under a run's settings.

    Args:
        public_size: the declared number of units of the audit's sites.
        seed: of coins and known keys; ``None``: fresh.
        parts: some of ``PARTS``; ``ledger`` needs ``canaries``.
        started: told the name of each part.
        done: called after each piece of work.

    Raises:
        ConfigError: there is nothing to audit, or a site would refuse the plan.
    """
    if config.privacy.mechanism == "none":
        raise ConfigError("privacy.mechanism = 'none': makes no promise, so there is nothing to audit; use 'dp-sgd'")
    seed = secrets.randbelow(2**53) if seed is None else seed
    begun = time.monotonic()
    verdicts: list[Verdict] = []
    estimate: Estimate | None = None
    with _folders() as folders, _quietly(), _one_thread(), torch.random.fork_rng():
        subject = _subject(config, public_size)
        with closing(Probe(folders(), subject, Examples([], subject.model.task))) as probe:
            assert probe.statement  # else the plan is refused, which is the user's to mend
        if "replay" in parts:
            started("replay")
            verdicts += replay(config, seed, folders, done)
        if "noise" in parts:
            started("noise")
            verdicts += measure(config, public_size, how.noise_values, folders, done)
        if "sampling" in parts:
            started("sampling")
            verdicts += sampling(subject, how.sampled_rounds, seed, folders, done)
        if "canaries" in parts:
            started("canaries")
            found, estimate, site = canary_runs(subject, seed, how.canary_runs, how.canary_steps, folders, done)
            verdicts += found
            with closing(site):
                if estimate is not None and "ledger" in parts:
                    started("ledger")
                    verdicts += ledger_steps(config, subject, site, estimate, seed, folders, done)
    return Audit(tuple(verdicts), estimate, seed, public_size, time.monotonic() - begun)


def _subject(config: RunConfig, public_size: int) -> Subject:
    clip_norm = max(phase.clip_norm for phase in config.phases)
    return canary_subject(config, canary_model(clip_norm), public_size)


@contextmanager
def _folders() -> Iterator[Folders]:
    """New folders below a temporary one, which is removed at the end."""
    numbers = count()
    with tempfile.TemporaryDirectory(prefix="consilium-audit-") as root:

        def fresh() -> Path:
            folder = Path(root) / str(next(numbers))
            folder.mkdir()
            return folder

        yield fresh


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings about units that fail, which the audit causes on purpose."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
