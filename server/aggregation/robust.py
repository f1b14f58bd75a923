"""Combining rules that a few hostile sites cannot win: ``median``, ``trimmed-mean``, ``multi-krum``.

**Weights.** None of them counts weights: every site has one vote. A declared size is the site's own claim; if it
counted, a site that claims more units than all others together would *be* the weighted median. The price: a small site
moves the result as much as a large one, though its update is noisier. ``server.weights`` still weighs sites' metrics.

**Under DP.** All rules are post-processing, so ε stays as it is, but they were made for sites that differ by chance.

* A median of n noisy values has π/2 times the variance of their mean (n large, noise of one size); a trimmed mean lies
  in between. Where sites differ in kind, the median is not a noisy mean but another value: an entry that only a few
  sites have a gradient for, such as the weights of a class that most sites do not know, has a median near zero, and is
  not learnt. Label skew therefore costs rare classes first, without any attack.
* Distances between noisy updates are mostly noise, ‖z_i - z_j‖² ≈ P·(σ_i² + σ_j²), and a small site has more of it
  (its denominator is smaller). Multi-Krum then turns away the smallest honest sites first. An attacker who adds no
  noise is nearer to everybody than any honest site, so it is chosen whenever it stays near the middle.

**Admission** comes first: sites that it has found to deviate no longer count among the f that a rule must withstand
(:func:`server.admission.still_facing`).

**With secure sums.** Impossible: each update must be seen.

**Memory.** Replies are read in blocks of one tensor of all sites, at most :data:`BLOCK` numbers at a time, so memory
does not grow with the number of replies; Multi-Krum keeps n² distances beside them (8 MB for 1000 sites).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from common.adapter import AdapterState
from common.errors import RunFailed
from common.messages import Tensors
from common.sections import PhaseSection
from server.aggregation.base import register_rule

BLOCK = 1 << 22
"""Most numbers that are read at a time (16 MiB)."""
_TILE = 256
"""Entries that are sorted at a time; so many of 1000 sites stay in the cache."""

Replies = list[Tensors]
"""The round's updates, none of which is read before the round is closed."""


class _AllAtOnce:
    """A rule that needs all updates before it can begin."""

    def __init__(self, phase: PhaseSection, least: int) -> None:
        self.phase, self.hostile, self.least = phase, phase.hostile_sites, least

    def empty(self) -> Replies:
        """No reply yet."""
        return []

    def add(self, folded: Replies, update: Tensors, weight: float) -> Replies:
        """Remembers the reply; the weight is not counted."""
        folded.append(update)
        return folded

    def close(self, folded: Replies) -> AdapterState:
        """The round's update.

        Raises:
            RunFailed: too few replies for ``phase.hostile_sites``.
        """
        if len(folded) < self.least:
            raise RunFailed(too_few(self.phase, self.least, len(folded)))
        return self.combined(folded)

    def combined(self, replies: Sequence[Tensors]) -> AdapterState:
        """The update of at least ``least`` replies."""
        raise NotImplementedError


def too_few(phase: PhaseSection, least: int, replies: int, found: int = 0) -> str:
    """What to say when there are too few replies for the phase's rule, or too few sites to send as many.

    Args:
        found: hostile sites that were turned away, so that they need not be withstood.
    """
    less = f", {found} of them found" if found else ""
    return (
        f"phase.{phase.name}.hostile_sites = {phase.hostile_sites}{less}: combine = '{phase.combine}' needs replies "
        f"of {least} sites to withstand so many, and there are {replies}; bring more sites back, then --resume, or "
        "start a new run with a smaller hostile_sites or combine = 'mean'"
    )


def blocks(replies: Sequence[Tensors], name: str) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """One tensor of all sites, piece by piece: which entries of the flattened tensor, and their values [n, m]."""
    size = replies[0][name].size
    width = max(1, BLOCK // len(replies))
    for start in range(0, size, width):
        entries = slice(start, min(start + width, size))
        block = np.empty((len(replies), entries.stop - start), np.float32)
        for row, reply in zip(block, replies, strict=True):
            row[:] = reply[name].reshape(-1)[entries]
        yield entries, block


class _MiddleOfEachEntry(_AllAtOnce):
    """For each entry on its own: the mean of the middle ones of the sorted values."""

    def kept(self, n: int) -> tuple[int, int]:
        """Which of n sorted values count: from the first to before the second."""
        raise NotImplementedError

    def combined(self, replies: Sequence[Tensors]) -> AdapterState:
        """The order of the replies does not matter, to the last bit."""
        first, end = self.kept(len(replies))
        update = {}
        for name in replies[0]:
            flat = np.empty(replies[0][name].size, np.float32)
            for entries, block in blocks(replies, name):
                for start in range(0, block.shape[1], _TILE):
                    ordered = np.ascontiguousarray(block[:, start : start + _TILE].T)
                    ordered.sort(axis=1)
                    middle = ordered[:, first:end].mean(axis=1, dtype=np.float64)
                    flat[entries.start + start : entries.start + start + len(middle)] = middle
            update[name] = flat.reshape(replies[0][name].shape)
        return update


@register_rule("median")
class Median(_MiddleOfEachEntry):
    """Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, Definition 1); of an even n the middle two's mean.

    Withstands any hostile minority; ``phase.hostile_sites`` is ignored.
    """

    def __init__(self, phase: PhaseSection) -> None:
        super().__init__(phase, least=1)

    def kept(self, n: int) -> tuple[int, int]:
        """The middle one or two."""
        return (n - 1) // 2, n // 2 + 1


@register_rule("trimmed-mean")
class TrimmedMean(_MiddleOfEachEntry):
    """Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, Definition 2): all but the f at either end.

    With f = ``phase.hostile_sites``, their βn; needs n > 2f.
    """

    def __init__(self, phase: PhaseSection) -> None:
        super().__init__(phase, least=2 * phase.hostile_sites + 1)

    def kept(self, n: int) -> tuple[int, int]:
        """All but f on either side."""
        return self.hostile, n - self.hostile


@register_rule("multi-krum")
class MultiKrum(_AllAtOnce):
    """Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757, §4): the mean of the n - f updates of lowest score.

    Score: sum of the squared distances to the n - f - 2 nearest others, over all tensors together. With f =
    ``phase.hostile_sites``; needs n > 2f + 2.
    """

    def __init__(self, phase: PhaseSection) -> None:
        super().__init__(phase, least=2 * phase.hostile_sites + 3)

    def combined(self, replies: Sequence[Tensors]) -> AdapterState:
        """Two passes: distances, then the mean in fp64."""
        chosen = [replies[index] for index in self.chosen(replies)]
        update = {}
        for name in replies[0]:
            flat = np.empty(replies[0][name].size, np.float32)
            for entries, block in blocks(chosen, name):
                flat[entries] = block.mean(axis=0, dtype=np.float64)
            update[name] = flat.reshape(replies[0][name].shape)
        return update

    def chosen(self, replies: Sequence[Tensors]) -> list[int]:
        """Which replies count, in order of their place; of equal scores the earlier."""
        n = len(replies)
        distances = squared_distances(replies)
        np.fill_diagonal(distances, np.inf)
        distances.sort(axis=1)
        scores = distances[:, : n - self.hostile - 2].sum(axis=1)
        return sorted(np.argsort(scores, kind="stable")[: n - self.hostile].tolist())


def squared_distances(replies: Sequence[Tensors]) -> npt.NDArray[np.float64]:
    """‖x_i - x_j‖² of all pairs [n, n], from inner products in fp64.

    The products are of x - mean(x), which changes no distance and spares digits where all updates lie far out.
    """
    products = np.zeros((len(replies), len(replies)))
    for name in replies[0]:
        for _, block in blocks(replies, name):
            around = block - block.mean(axis=0, dtype=np.float64)
            products += around @ around.T
    norms = products.diagonal()
    found: npt.NDArray[np.float64] = np.maximum(norms[:, np.newaxis] + norms - 2 * products, 0.0)
    return found
