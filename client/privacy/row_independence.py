"""A probe that refuses models in which one row of a batch can move another row's gradient.

Clipping bounds what one privacy unit adds to a sum only if it changes nothing else in that sum. A model that
normalises, routes or quantises over the whole batch breaks this in silence: its per-example gradients look right, and
removing one unit moves all the others. At a fixed physical shape a sound model gives the other rows the same bits
whatever a row holds, so the demand is equality of bits, without a tolerance to argue about.

=====================================  ===============  ==============================================================
what mixes rows                        found by         how
=====================================  ===============  ==============================================================
BatchNorm that uses batch statistics   type and probe   mean and variance are over all rows
experts of limited capacity            type and probe   a token is dropped if other rows' tokens came first
LLM.int8 (bitsandbytes)                type and probe   a column is an outlier as soon as one row makes it one
per-tensor dynamic fp8 or int8         type and probe   the scale is the largest value of all rows
shortcuts for batches without padding  probe            another kernel as soon as one row is padded
anything else                          probe            named by the module in which the difference appears first
=====================================  ===============  ==============================================================

The probe uses public random token ids and a random adapter. Its answer depends on model, plan and machine, never on
data, so a site may refuse on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from client.privacy.per_sample import per_sample_gradients
from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.cuts import INPUT, Cut
from common.errors import CoverageError, ModelError, PrivacyError

PROBE_LENGTH = 32
"""Tokens of each row of the probe, where the plan allows that many."""

_CAPACITIES = ("expert_capacity", "capacity_factor", "eval_capacity_factor")
_REMEDY = "so one record could move another's gradient; choose a base model without it, or train without DP"


@dataclass(frozen=True)
class _Batch:
    """One physical batch of the probe: ids and mask [B, T], targets, weights [B], and which rows are as before."""

    ids: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    kept: slice
    what: str


Rows = dict[str, torch.Tensor]
"""Frozen prefix, losses and per-example gradients by name, each [B, ...]."""


def check_row_independence(
    model: AdaptedModel, names: Sequence[str], rows: int, length: int = PROBE_LENGTH, seed: int = 0
) -> None:
    """Demands that a row's gradients keep their bits whatever the other rows hold.

    Four forward and backward passes of one small batch (eight where a phase can start from pooled features), through
    the model as it is placed: device, number format, prefix, top and :func:`per_sample_gradients` are those of the
    training. One row gets other tokens, then the most extreme ones; then all rows but one become dummies.

    Args:
        model: with any adapter loaded; it is put back.
        names: the tensors that a phase trains.
        rows: rows of a physical batch. With one row there is nothing to mix.
        length: tokens of a row, at most the plan's ``max_length``.
        seed: of the public random tokens and adapter.

    Raises:
        PrivacyError: names the module that mixes rows, or says that the machine does not repeat its own results.
        CoverageError: a parameter of the phase has no exact per-example gradient.
    """
    check_modules(model.peft)
    if rows < 2:
        return
    received = model.state()
    adapter = _random_adapter(model, seed)
    cuts = {model.layer_cut: adapter}
    if model.cut_for(names, _without_lora(model, adapter)).layer is None:
        cuts[Cut(None)] = _without_lora(model, adapter)
    batches = list(_batches(model, rows, min(length, model.task.settings.max_length), seed))
    try:
        with torch.random.fork_rng():
            for cut, state in cuts.items():
                model.load(state)
                _probe(model, names, cut, batches)
    finally:
        model.load(received)


class Probed:
    """Remembers the probe's verdicts: one probe for each model, set of tensors and number of rows."""

    def __init__(self) -> None:
        self._verdicts: WeakKeyDictionary[AdaptedModel, dict[tuple[tuple[str, ...], int], str]] = WeakKeyDictionary()

    def fault(self, model: AdaptedModel, names: tuple[str, ...], rows: int) -> str:
        """Why these tensors of the model cannot be trained under DP; empty if they can. Looks at no data."""
        verdicts = self._verdicts.setdefault(model.original, {})
        if (names, rows) not in verdicts:
            try:
                check_row_independence(model, names, rows)
                verdicts[names, rows] = ""
            except (CoverageError, ModelError, PrivacyError) as error:
                verdicts[names, rows] = str(error)
        return verdicts[names, rows]


def check_modules(network: nn.Module) -> None:
    """Refuses modules that are known to mix rows, as they stand: BatchNorm in eval mode, for one, does not.

    Raises:
        PrivacyError: names the first such module.
    """
    for name, module in network.named_modules():
        if found := _known(module):
            raise PrivacyError(f"model: '{name}' ({type(module).__name__}) {found}, {_REMEDY}")


def _known(module: nn.Module) -> str | None:
    """How this very module mixes rows, if that is known. Libraries that need not be installed are known by name."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        return "normalises by statistics of the whole batch"
    if any(vars(module).get(capacity) is not None for capacity in _CAPACITIES):
        return "limits the capacity of its experts, which the rows of a batch then share"
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if "Linear8bitLt" in kinds and getattr(getattr(module, "state", None), "threshold", None) != 0:
        return "picks outlier columns over the whole batch (LLM.int8)"
    if "Float8Linear" in kinds:
        return "scales its inputs by the largest value of the whole batch (dynamic fp8)"
    return None


def _probe(model: AdaptedModel, names: Sequence[str], cut: Cut, batches: Sequence[_Batch]) -> None:
    first, *others = batches
    with model.training(names) as parameters, per_sample_gradients(model.peft, parameters) as forget:

        def run(batch: _Batch) -> Rows:
            try:
                return _rows(model, parameters, batch, cut)
            finally:
                forget()

        before = run(first)
        if not all(bool(torch.isfinite(value).all()) for value in before.values()):
            raise PrivacyError(
                "model: has no finite gradient for random tokens, so nothing can be said about its rows; use float32 "
                "or bfloat16"
            )
        for changed in others:
            after = run(changed)
            different = _different(before, after, changed.kept)
            if different is None:
                continue
            if _different(before, run(first), slice(None)) is not None:
                raise PrivacyError(
                    "model: the same batch does not give the same gradients twice on this machine, so rows cannot be "
                    "compared; make its kernels deterministic or use another device"
                )
            place = _first_mixing(model, first, changed, cut)
            raise PrivacyError(f"model: {place} mixes the rows of a batch ('{different}', {changed.what}), {_REMEDY}")


def _rows(model: AdaptedModel, parameters: dict[str, nn.Parameter], batch: _Batch, cut: Cut) -> Rows:
    losses, hidden = _losses(model, batch, cut)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    rows = {"the loss": losses.detach()}
    if cut != INPUT:
        rows["the frozen prefix"] = hidden
    for name, parameter in parameters.items():
        gradient = parameter.grad_sample  # type: ignore[attr-defined]
        if isinstance(gradient, torch.Tensor):  # else nothing of the phase reaches it, and to clip it is refused
            rows[name] = gradient.detach().clone()
    return rows


def _losses(model: AdaptedModel, batch: _Batch, cut: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss of each row [B], as the trainer computes it, and what entered the top."""
    torch.manual_seed(0)  # the same dropout mask in every pass
    hidden = batch.ids if cut == INPUT else model.prefix(batch.ids, batch.mask, cut)
    losses = model.task.per_example_loss(model.top(hidden, batch.mask, cut), batch.targets)
    return torch.where(batch.weights > 0, losses, torch.zeros_like(losses)), hidden


def _different(before: Rows, after: Rows, kept: slice) -> str | None:
    """The first value of which a kept row has other bits."""
    for name, value in before.items():
        if name not in after or not torch.equal(value[kept], after[name][kept]):
            return name
    return None


# ---------------------------------------------------------------------------------------------------- what is fed in


def _batches(model: AdaptedModel, rows: int, length: int, seed: int) -> Iterator[_Batch]:
    """A batch without padding, and three changes of it."""
    device = model.base.placement.device
    embedding: Any = model.network.get_input_embeddings()
    generator = np.random.default_rng(seed)
    tokens = torch.from_numpy(generator.integers(0, embedding.weight.shape[0], (rows + 1, length))).to(device)
    classes = max(1, len(model.task.settings.labels))
    targets = model.task.collate(
        [np.asarray(row % classes) if model.task.selects_pooling else tokens[row].cpu().numpy() for row in range(rows)],
        length,
    ).to(device)
    ids, mask, weights = tokens[:rows], torch.ones_like(tokens[:rows]), torch.ones(rows, device=device)
    yield _Batch(ids, mask, targets, weights, slice(None), "as it is")

    other, extreme = ids.clone(), ids.clone()
    other[0] = tokens[rows]
    yield _Batch(other, mask, targets, weights, slice(1, None), "one row with other tokens")

    extreme[0] = int(torch.linalg.vector_norm(embedding.weight.detach(), dim=1).argmax())
    yield _Batch(extreme, mask, targets, weights, slice(1, None), "one row with the largest embedding throughout")

    pads, first, void = ids.clone(), mask.clone(), weights.clone()
    pads[:-1], first[:-1, 1:], void[:-1] = model.base.tokenizer.pad_token_id or 0, 0, 0  # as common.examples fills up
    yield _Batch(pads, first, targets, void, slice(rows - 1, None), "all other rows dummies")


def _random_adapter(model: AdaptedModel, seed: int) -> AdapterState:
    """Zero nowhere: with B = 0 the gradients of A would be zero, and nothing would be probed."""
    generator = np.random.default_rng(seed)
    return {
        name: (0.5 * shape[-1] ** -0.5 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in model.spec.shapes
    }


def _without_lora(model: AdaptedModel, adapter: AdapterState) -> AdapterState:
    """The adapter with B = 0, as before any LoRA phase: then a head trains on pooled features."""
    return {name: np.zeros_like(value) if model.group_of(name) == "B" else value for name, value in adapter.items()}


# --------------------------------------------------------------------------------------------- where the rows are mixed


def _first_mixing(model: AdaptedModel, first: _Batch, changed: _Batch, cut: Cut) -> str:
    """The first module to finish whose kept rows go in the same and come out different."""
    before, after = (_seen(model, batch, cut) for batch in (first, changed))
    for one, other in zip(before, after, strict=False):
        if _same(one.given, other.given, changed.kept) and not _same(one.result, other.result, changed.kept):
            return f"'{one.name}' ({one.kind})"
    return "its backward pass" if len(before) == len(after) else "a part of it"


@dataclass(frozen=True)
class _Seen:
    """One call of a module with one row per example: its first input, if that is a tensor, and its output."""

    name: str
    kind: str
    given: torch.Tensor | None
    result: torch.Tensor


def _same(one: torch.Tensor | None, other: torch.Tensor | None, kept: slice) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(one[kept], other[kept])


def _seen(model: AdaptedModel, batch: _Batch, cut: Cut) -> list[_Seen]:
    """The calls of a forward pass in the order in which they end."""
    rows, found = len(batch.ids), list[_Seen]()

    def rowwise(values: Any) -> torch.Tensor | None:
        value = values[0] if isinstance(values, tuple) and values else values
        fits = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows
        return value.detach().clone() if fits else None

    def watch(name: str) -> Any:
        def keep(module: nn.Module, given: Any, result: Any) -> None:
            if (output := rowwise(result)) is not None:
                found.append(_Seen(name, type(module).__name__, rowwise(given), output))

        return keep

    with ExitStack() as undo, torch.no_grad():
        for name, module in model.peft.named_modules():
            undo.callback(module.register_forward_hook(watch(name)).remove)
        _losses(model, batch, cut)
    return found
