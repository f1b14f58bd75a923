"""Faults of a privacy engine, planted one at a time, for tests of the audit.

Each is a context manager that replaces a piece of the installed engine. ``FAULTS`` says which of the audit's checks
must name it, and by which words.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import client.privacy.budget as budget
import client.privacy.mechanism as mechanism
import client.privacy.noisy_sum as noisy_sum
import client.site
import client.trainer as trainer
import common.examples as examples
from client import egress
from client.policy import Policy
from client.privacy.ledger import Ledger
from client.privacy.mechanism import DPSGD
from client.privacy.sampling import RoundSecret
from client.site import Site
from common.errors import PrivacyError
from common.messages import RefusalReason
from common.privacy.accounting import PhaseLoad

Replace = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextmanager
def replaced(owner: Any, name: str, change: Replace) -> Iterator[None]:
    """``owner.name`` becomes ``change(owner.name)``."""
    original = getattr(owner, name)
    with patch.object(owner, name, functools.wraps(original)(change(original))):
        yield


def fault(owner: Any, name: str) -> Callable[[Replace], Callable[[], AbstractContextManager[None]]]:
    """A fault that replaces one function."""
    return lambda change: lambda: replaced(owner, name, change)


# --------------------------------------------------------------------------------------------------------------- noise


def altered_noise(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> AbstractContextManager[None]:
    """The secure noise, altered after it was drawn."""
    return replaced(
        noisy_sum,
        "rounded_gaussian",
        lambda original: lambda key, deviation, n: change(original(key, deviation, n)).astype(np.int64),
    )


def no_noise() -> AbstractContextManager[None]:
    return altered_noise(np.zeros_like)


def half_noise() -> AbstractContextManager[None]:
    return altered_noise(lambda noise: noise // 2)


def uniform_noise() -> AbstractContextManager[None]:
    """Of the right variance, but bounded."""

    def flat(original: Callable[..., Any]) -> Callable[..., Any]:
        def draw(key: bytes, deviation: float, n: int) -> np.ndarray[Any, Any]:
            generator = np.random.default_rng(int.from_bytes(key[:8], "little"))
            return np.rint(generator.uniform(-1, 1, n) * deviation * np.sqrt(3)).astype(np.int64)

        return draw

    return replaced(noisy_sum, "rounded_gaussian", flat)


def noise_on_some_layers_only() -> AbstractContextManager[None]:
    return altered_noise(lambda noise: np.where(np.arange(len(noise)) < len(noise) * 2 // 3, noise, 0))


def layers_share_their_noise() -> AbstractContextManager[None]:
    """The first values again and again, as a generator that is seeded anew for each layer would give."""
    return altered_noise(lambda noise: np.resize(noise[: max(1, len(noise) // 4)], len(noise)))


@contextmanager
def noise_divided_by_the_batch() -> Iterator[None]:
    batch = [1.0]

    def remember(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: DPSGD, *arguments: Any, **keywords: Any) -> None:
            original(self, *arguments, **keywords)
            batch[0] = self.expected_batch

        return init

    with replaced(DPSGD, "__init__", remember), altered_noise(lambda noise: np.rint(noise / batch[0])):
        yield


@fault(RoundSecret, "derive")
def steps_share_their_noise(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, label, step: original(self, label, 0 if label == "noise" else step)


@fault(Site, "_fresh_secret")
def rounds_share_their_noise(original: Callable[..., Any]) -> Callable[..., Any]:
    def fresh(self: Any, round: int) -> RoundSecret:
        if self.fixed_seed is None:
            return self.__dict__.setdefault("_only_secret", RoundSecret.from_system())  # type: ignore[no-any-return]
        return original(self, round)  # type: ignore[no-any-return]

    return fresh


@fault(Site, "_fresh_secret")
def noise_reused_after_a_ledger_restore(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keys from a master key in the ledger's folder and the number of rounds charged so far."""

    def fresh(self: Any, round: int) -> RoundSecret:
        if self.fixed_seed is not None:
            return original(self, round)  # type: ignore[no-any-return]
        file = self.ledger.folder / "master.key"
        if not file.exists():
            file.write_bytes(secrets.token_bytes(32))
        charged = sum(len(self.ledger.charges(entry.digest)) for entry in self.ledger.plans())
        return RoundSecret(hashlib.sha256(file.read_bytes() + bytes([charged])).digest())

    return fresh


@fault(Ledger, "__init__")
def _key_at_approval(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Ledger, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        file = self.folder / "master.key"
        if not file.exists():
            file.write_bytes(secrets.token_bytes(32))

    return init


@contextmanager
def ledger_restore() -> Iterator[None]:
    with _key_at_approval(), noise_reused_after_a_ledger_restore():
        yield


@fault(Site, "_fresh_secret")
def noise_seeded_from_the_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    def fresh(self: Any, round: int) -> RoundSecret:
        return original(self, round) if self.fixed_seed is not None else RoundSecret.fixed(0, "plan.seed", round)  # type: ignore[no-any-return]

    return fresh


# ------------------------------------------------------------------------------------------------- gradients and units


@fault(mechanism, "clip_factors")
def no_clipping(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda gradients, clip_norm: torch.ones_like(original(gradients, clip_norm))


@fault(mechanism, "clip_factors")
def clip_norm_doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda gradients, clip_norm: original(gradients, 2 * clip_norm)


@fault(mechanism, "clip_factors")
def clip_by_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def factors(gradients: list[torch.Tensor], clip_norm: float) -> torch.Tensor:
        kept = original(gradients, clip_norm)  # zeroes what is not finite
        size = torch.stack([gradient.double().sum(dim=0).norm() for gradient in gradients]).norm()
        return torch.full_like(kept, min(1.0, clip_norm / max(float(size), 1e-300)))

    return factors


@fault(mechanism, "clip_factors")
def one_layer_unclipped(original: Callable[..., Any]) -> Callable[..., Any]:
    def factors(gradients: list[torch.Tensor], clip_norm: float) -> torch.Tensor:
        original(gradients, clip_norm)  # zeroes what is not finite
        found: torch.Tensor = original(gradients[:-1], clip_norm)
        gradients[-1] /= found.to(gradients[-1])[:, None].clamp(min=1e-6)
        return found

    return factors


@fault(trainer, "weighted_losses")
def loss_averaged_over_the_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, batch, cut: original(model, batch, cut) / (batch.weights > 0).sum().clamp(min=1)


@fault(mechanism, "clip_factors")
def nan_passed_through(original: Callable[..., Any]) -> Callable[..., Any]:
    def factors(gradients: list[torch.Tensor], clip_norm: float) -> torch.Tensor:
        raw = [gradient.clone() for gradient in gradients]
        found: torch.Tensor = original(gradients, clip_norm)
        for gradient, before in zip(gradients, raw, strict=True):
            gradient.copy_(before)
        return found

    return factors


@contextmanager
def nan_refused() -> Iterator[None]:
    def strict(original: Callable[..., Any]) -> Callable[..., Any]:
        def factors(gradients: list[torch.Tensor], clip_norm: float) -> torch.Tensor:
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                raise PrivacyError("a gradient is not finite")
            return original(gradients, clip_norm)  # type: ignore[no-any-return]

        return factors

    def polite(original: Callable[..., Any]) -> Callable[..., Any]:
        def train(self: Any, request: Any) -> Any:
            try:
                return original(self, request)
            except PrivacyError:
                return egress.refuse(self.name, RefusalReason.POLICY)

        return train

    with replaced(mechanism, "clip_factors", strict), replaced(Site, "train", polite):
        yield


@contextmanager
def retry_adds_twice() -> Iterator[None]:
    """After a batch has failed, what follows is counted as lost once and added once more."""

    def unsafe(original: Callable[..., Any]) -> Callable[..., Any]:
        def accumulate(self: Any, *arguments: Any) -> None:
            try:
                original(self, *arguments)
            except Exception:
                self.__dict__["_retrying"] = True
                raise
            if self.__dict__.get("_retrying"):
                original(self, *arguments)

        return accumulate

    with replaced(DPSGD, "accumulate", unsafe):
        yield


@fault(examples.Examples, "__init__")
def unit_ignored(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, encoded: Any, task: Any, *arguments: Any, **keywords: Any) -> None:
        keywords.pop("units", None)
        original(self, encoded, task, *arguments, **keywords)

    return init


@fault(examples.Examples, "_targets")
def unit_summed(original: Callable[..., Any]) -> Callable[..., Any]:
    def targets(self: Any, *arguments: Any) -> Any:
        found, weights = original(self, *arguments)
        return found, (weights > 0).to(weights)

    return targets


@fault(DPSGD, "sample")
def denominator_from_the_true_n(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: DPSGD, n: int, step: int) -> Any:
        self.expected_batch = max(1.0, self.statement.sample_rate * n)
        return original(self, n, step)

    return sample


# ------------------------------------------------------------------------------------------------ sampling and account


@fault(mechanism, "poisson_sample")
def shuffled_instead_of_poisson(original: Callable[..., Any]) -> Callable[..., Any]:
    """Epochs of a shuffled data set, in batches of exactly q·n units."""
    generator = np.random.default_rng(0)
    left = np.zeros(0, np.int64)

    def sample(n: int, rate: float, secret: RoundSecret, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        nonlocal left
        size = round(rate * n)
        if n and (len(left) < size or left.max(initial=0) >= n):
            left = generator.permutation(n)
        chosen, left = (left[:size], left[size:]) if n else (np.zeros(0, np.int64), left)
        return np.sort(chosen)

    return sample


@fault(mechanism, "poisson_sample")
def sampling_rate_doubled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda n, rate, secret, step: original(n, min(1.0, 2 * rate), secret, step)


@fault(mechanism, "poisson_sample")
def steps_share_their_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda n, rate, secret, step: original(n, rate, secret, 0)


@contextmanager
def rounds_not_composed() -> Iterator[None]:
    """The noise pays for one round of each phase, and ε is claimed for all of them."""
    target = [0.0]

    def one_round(original: Callable[..., Any]) -> Callable[..., Any]:
        def calibrate(loads: list[PhaseLoad], epsilon: float, delta: float) -> Any:
            target[0] = epsilon
            steps = min(load.steps for load in loads)
            once = [PhaseLoad(load.sample_rate, max(1, load.steps // steps), load.share) for load in loads]
            return original(once, epsilon, delta)

        return calibrate

    def claimed(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda segments, delta: target[0]

    with replaced(budget, "calibrate", one_round), replaced(budget, "epsilon", claimed):
        yield


@fault(Ledger, "reserve")
def ledger_counts_fewer_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, plan, round, request, phase, steps, fresh: original(self, plan, round, request, phase, 1, fresh)


@fault(client.site, "train_round")
def one_step_more(original: Callable[..., Any]) -> Callable[..., Any]:
    """An off-by-one in the loop over steps."""

    def train(model: Any, data: Any, received: Any, phase: Any, *rest: Any) -> Any:
        return original(model, data, received, phase.model_copy(update={"steps": phase.steps + 1}), *rest)

    return train


@fault(Site, "_receive")
def fresh_budget_after_reshuffling(original: Callable[..., Any]) -> Callable[..., Any]:
    """The population is told by a digest of the rows in their order."""

    def receive(self: Any, plan: Any, digest: str, signature: str) -> None:
        rows = self._examples(plan, self.resources.model(plan)).encoded
        name = hashlib.sha256(b"".join(item.ids.tobytes() for item in rows if item is not None)).hexdigest()
        fresh = replace(self.policy.population_of(plan), name=name)
        self.ledger.declare(fresh)
        with patch.object(Policy, "population_of", lambda policy, plan: fresh):
            original(self, plan, digest, signature)

    return receive


# ------------------------------------------------------------------------------------------------------------ the list


@dataclass(frozen=True)
class Fault:
    """A planted fault and the verdict that must name it."""

    plant: Callable[[], AbstractContextManager[None]]
    part: str
    """The part of the audit that is run; the check below is in it."""
    check: str
    suspected: str
    """Words of the suspicion."""
    by_patient: bool = False
    """Planted in an engine that protects patients; else examples."""
    noise: str = "secure"
    """Of the plan; some faults matter in one of both engines only."""


FAULTS: dict[str, Fault] = {
    "no noise": Fault(no_noise, "noise", "noise-scale", "there is no noise"),
    "half noise": Fault(half_noise, "noise", "noise-scale", "half its scale"),
    "noise divided by the batch": Fault(noise_divided_by_the_batch, "noise", "noise-scale", "divided by the batch"),
    "noise that is not normal": Fault(uniform_noise, "noise", "noise-is-normal", "not Gaussian"),
    "noise on some layers only": Fault(noise_on_some_layers_only, "noise", "noise-in-every-layer", "there is no noise"),
    "layers share their noise": Fault(
        layers_share_their_noise, "noise", "coordinates-independent", "share their noise"
    ),
    "steps share their noise": Fault(steps_share_their_noise, "noise", "noise-scale", "steps of a round share"),
    "rounds share their noise": Fault(
        rounds_share_their_noise, "noise", "rounds-independent", "rounds of a site share"
    ),
    "noise reused after a ledger restore": Fault(ledger_restore, "noise", "restore-independent", "restored copy"),
    "noise seeded from the plan": Fault(
        noise_seeded_from_the_plan, "noise", "sites-independent", "seeded from the plan"
    ),
    "no clipping": Fault(no_clipping, "replay", "sensitivity", "not clipped"),
    "clip norm doubled": Fault(clip_norm_doubled, "replay", "sensitivity", "2 times the clip norm"),
    "clip by batch": Fault(clip_by_batch, "replay", "units-independent", "clipping acts on a whole batch"),
    "one layer unclipped": Fault(one_layer_unclipped, "replay", "sensitivity", "escapes clipping"),
    "loss averaged over the batch": Fault(
        loss_averaged_over_the_batch, "replay", "units-independent", "averaged over the batch"
    ),
    "NaN passed through": Fault(nan_passed_through, "replay", "nan-contributes-zero", "not a number", noise="fast"),
    "NaN refused": Fault(nan_refused, "replay", "release-always-sent", "answered with a refusal"),
    "a retry adds twice": Fault(retry_adds_twice, "replay", "failure-contributes-zero", "added twice"),
    "denominator from the true n": Fault(
        denominator_from_the_true_n, "replay", "public-denominator", "true number of units"
    ),
    "unit ignored": Fault(unit_ignored, "replay", "sensitivity", "privacy unit is ignored", by_patient=True),
    "unit summed": Fault(unit_summed, "replay", "unit-is-a-mean", "added up", by_patient=True),
    "shuffled instead of Poisson": Fault(shuffled_instead_of_poisson, "sampling", "poisson", "shuffled"),
    "sampling rate doubled": Fault(sampling_rate_doubled, "sampling", "sample-rate", "twice the stated rate"),
    "steps share their sample": Fault(steps_share_their_sample, "sampling", "poisson", "the same again"),
    "rounds not composed": Fault(rounds_not_composed, "canaries", "epsilon", "not composed"),
    "rounds not composed, by the account": Fault(
        rounds_not_composed, "ledger", "claim-covers-the-plan", "not composed"
    ),
    "half noise, by canaries": Fault(half_noise, "canaries", "canary-shift", "more than stated"),
    "ledger counts fewer steps": Fault(ledger_counts_fewer_steps, "ledger", "steps-executed", "other steps"),
    "one step more than charged": Fault(one_step_more, "ledger", "steps-executed", "other steps"),
    "fresh budget after reshuffling": Fault(
        fresh_budget_after_reshuffling, "ledger", "lifetime-budget", "fresh budget"
    ),
}


@contextmanager
def seeded_secrets(seed: int) -> Iterator[None]:
    """The operating system's entropy, repeatable."""
    generator = np.random.default_rng(seed)
    with ExitStack() as stack:
        stack.enter_context(patch.object(secrets, "token_bytes", lambda n=32: generator.bytes(n)))
        yield
