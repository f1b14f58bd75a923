"""Secret randomness of one round at one site, and Poisson sampling from it.

A round has one 32-byte secret. Everything random in it (who is sampled, the noise, dropout) is derived from the secret
by HMAC-SHA256 with a label and the step, so that a crash re-executes the same release and nothing else can.

Sampling is read from SHAKE-256 over the derived 32 bytes, and noise that is released from as strong a stream
(:mod:`common.privacy.noise`), not from a generator that is merely seeded with them: torch's CPU generator keeps the low
32 bits of its seed, and whoever sees a release could try them all.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class RoundSecret:
    """The secret of one round. Never logged, never sent; ``repr`` does not show it."""

    value: bytes = field(repr=False)

    @classmethod
    def from_system(cls) -> RoundSecret:
        """Fresh entropy from the operating system: what a deployment uses."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def fixed(cls, seed: int, site: str, round: int) -> RoundSecret:
        """A reproducible secret for simulations and tests; no privacy is claimed against those who know the seed."""
        return cls(hashlib.sha256(f"fixed\0{seed}\0{site}\0{round}".encode()).digest())

    def derive(self, label: str, step: int) -> bytes:
        """32 bytes for one purpose in one step."""
        return hmac.digest(self.value, f"{label}\0{step}".encode(), "sha256")

    def torch_seed(self, label: str, step: int) -> int:
        """A seed for torch's own generators, of which a CPU's keeps 32 bits: for what no ε rests on (dropout, which
        needs a plan without privacy)."""
        return int.from_bytes(self.derive(label, step)[:8], "little", signed=False) >> 1

    def uniform(self, label: str, step: int, n: int) -> npt.NDArray[np.float64]:
        """``n`` multiples of 2⁻⁵³ in [0, 1), uniform and independent."""
        words = np.frombuffer(hashlib.shake_256(self.derive(label, step)).digest(8 * n), "<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def poisson_sample(n: int, sample_rate: float, secret: RoundSecret, step: int) -> npt.NDArray[np.int64]:
    """Indices of the units in this step: each of the ``n`` independently with probability ``sample_rate``.

    This is the sampling the accountant assumes (Abadi et al. 2016, arXiv 1607.00133, §3.1: "lot"); shuffled batches of
    a fixed size are not. The result may be empty.
    """
    return np.flatnonzero(secret.uniform("sample", step, n) < sample_rate)


def examples_of(
    units: npt.NDArray[np.int64] | None, chosen: npt.NDArray[np.int64], most: int, secret: RoundSecret, step: int
) -> npt.NDArray[np.int64]:
    """The examples that the chosen units contribute in this step: at most ``most`` of each, drawn afresh every step.

    Which of its own examples a unit contributes is no one else's concern and costs no privacy: its contribution is
    clipped as a whole, whatever they are.

    Args:
        units: [n] number of each example's unit; ``None``: each example is a unit of its own.
        chosen: units of this step.

    Returns:
        Indices of examples, in increasing order.
    """
    if units is None:
        return chosen
    taking_part = np.zeros(int(units.max(initial=-1)) + 2, bool)
    taking_part[chosen] = True  # the last entry stands for rows of no unit, number -1
    members = np.flatnonzero(taking_part[units])
    order = members[np.lexsort((secret.uniform("examples", step, len(units))[members], units[members]))]
    starts = np.flatnonzero(np.diff(units[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
    return np.sort(order[rank < most])
