"""What a step of DP-LoRA costs beside the same step without privacy, and beside Opacus's two ways.

    OMP_NUM_THREADS=1 python benchmarks/dp_step.py --pairs 30
    OMP_NUM_THREADS=1 python benchmarks/dp_step.py --pairs 30 --cells 'b16-*'

A cell is a model, a physical batch, a length and a set of adapted modules. Each round of a cell runs one full step of
every arm (forward, backward, clipping, noise, SGD) in an order drawn anew, and every ratio is taken to the non-private
step of the same round, in wall time and in CPU time. ``upper`` is a distribution-free one-sided 95 % bound on the
median of the ratios (an order statistic). Cells are merged into results/dp_step.json, so it can be run in parts.

=============  =========================================================================================================
``none``       plain autograd and SGD: the reference
``fused``      the product's mechanism with ``noise = "fast"``
``secure``     the product's mechanism with ``noise = "secure"``, the default of a deployment
``hooks``      Opacus's hooks and DPOptimizer
``ghost``      Opacus's ghost clipping
=============  =========================================================================================================

Memory is told in two ways. ``tensors``: the peak of what torch's allocator holds during one step above what it held
before, read from the profiler (on a GPU from the allocator's own counter); exact, but blind to what libraries allocate.
``resident``: the peak resident size of a process of its own that runs three steps, less its size before the first.

The GPU cells (a random Llama of 1.04 billion parameters in bf16) run where there is CUDA and are skipped elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, environment
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from client.privacy.mechanism import DPSGD
from client.privacy.sampling import RoundSecret
from common.messages import PhaseStatement
from common.model import checkpointed

OUT = RESULTS / "dp_step.json"
ARMS = ("none", "fused", "secure", "hooks", "ghost")
CLASSES, CLIP_NORM = 11, 1.0


@dataclass(frozen=True)
class Cell:
    """One column of the table."""

    model: str
    batch: int
    length: int
    targets: str
    recompute: bool = False

    @property
    def name(self) -> str:
        """E.g. ``b16-l64-attention``."""
        shape = f"b{self.batch}-l{self.length}-{self.targets}"
        return shape if self.model == "minilm" else f"{self.model}-{shape}{'-recompute' if self.recompute else ''}"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu" if self.model == "minilm" else "cuda")


CELLS = (
    *(Cell("minilm", b, t, targets) for targets in ("attention", "all") for b in (16, 32) for t in (64, 128)),
    *(Cell("llama1b", 32, 512, targets, recompute) for targets in ("attention", "all") for recompute in (True, False)),
)
TARGETS = {
    ("minilm", "attention"): ["query", "value"],
    ("minilm", "all"): ["query", "key", "value", "dense"],
    ("llama1b", "attention"): ["q_proj", "v_proj"],
    ("llama1b", "all"): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


# --------------------------------------------------------------------------------------------------- models and steps


def build(cell: Cell) -> Any:
    """A random model of the cell's shape with LoRA of rank 8, A and B (and the head) trained; B is not zero."""
    torch.manual_seed(0)
    lora: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS[cell.model, cell.targets]}
    if cell.model == "minilm":
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        network: Any = BertForSequenceClassification(BertConfig(**sizes, num_labels=CLASSES))
        lora |= {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["classifier"], "exclude_modules": ".*pooler.*"}
    else:
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            use_cache=False,
        )
        with torch.device(cell.device):
            torch.set_default_dtype(torch.bfloat16)
            network = LlamaForCausalLM(config)
            torch.set_default_dtype(torch.float32)
        lora["task_type"] = TaskType.CAUSAL_LM
    model = get_peft_model(network, LoraConfig(**lora)).to(cell.device).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    for module in model.modules():  # as in the product: the adapter's own modules train, the base stays in eval mode
        module.training = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return model


def losses_of(model: Any, cell: Cell) -> Callable[[], torch.Tensor]:
    """Per-example losses [B] of one fixed batch of ragged texts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (cell.batch, cell.length), generator=generator).to(cell.device)
    lengths = torch.randint(cell.length // 2, cell.length + 1, (cell.batch, 1), generator=generator).to(cell.device)
    mask = (torch.arange(cell.length, device=cell.device) < lengths).long()
    labels = torch.randint(0, CLASSES, (cell.batch,), generator=generator).to(cell.device)

    def of_texts() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits
        return functional.cross_entropy(logits.float(), labels, reduction="none")

    def of_tokens() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        learnt = mask[:, 1:].float()
        losses = functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        return (losses * learnt).sum(1) / learnt.sum(1)

    return of_texts if cell.model == "minilm" else of_tokens


@contextmanager
def stepping(arm: str, cell: Cell) -> Iterator[Callable[[], None]]:
    """Yields one full step of an arm on a model of its own."""
    model = build(cell)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sgd = torch.optim.SGD(list(parameters.values()), lr=1e-4)
    losses = losses_of(model, cell)
    with ExitStack() as stack:
        if cell.recompute:
            stack.enter_context(checkpointed(list(model.base_model.model.model.layers)))
        yield {"none": _plain, "hooks": _hooks, "ghost": _ghost}.get(arm, _product)(
            arm, model, parameters, sgd, losses, stack, cell
        )


def _plain(_: str, model: Any, parameters: Any, sgd: Any, losses: Any, stack: ExitStack, cell: Cell) -> Any:
    def step() -> None:
        losses().sum().backward()
        for parameter in parameters.values():
            parameter.grad /= cell.batch
        sgd.step()
        sgd.zero_grad()

    return step


def _product(arm: str, model: Any, parameters: Any, sgd: Any, losses: Any, stack: ExitStack, cell: Cell) -> Any:
    statement = PhaseStatement("benchmark", 1.0, 1.0, CLIP_NORM, 1)
    secret = RoundSecret.fixed(0, "benchmark", 1)
    mechanism = DPSGD(statement, cell.batch, secret, "secure" if arm == "secure" else "fast")
    stack.enter_context(mechanism.attach(model, parameters, sgd))
    taken = iter(range(1 << 30))

    def step() -> None:
        mechanism.accumulate(losses)
        mechanism.step(next(taken))

    return step


def _hooks(_: str, model: Any, parameters: Any, sgd: Any, losses: Any, stack: ExitStack, cell: Cell) -> Any:
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=False)
    stack.callback(hooks.cleanup)
    optimizer = DPOptimizer(
        sgd, noise_multiplier=1.0, max_grad_norm=CLIP_NORM, expected_batch_size=None, loss_reduction="sum"
    )

    def step() -> None:
        losses().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _ghost(_: str, model: Any, parameters: Any, sgd: Any, losses: Any, stack: ExitStack, cell: Cell) -> Any:
    hooks = GradSampleHooksFastGradientClipping(
        model, batch_first=True, loss_reduction="sum", strict=False, max_grad_norm=CLIP_NORM, use_ghost_clipping=True
    )
    stack.callback(hooks.cleanup)
    optimizer = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=1.0, max_grad_norm=CLIP_NORM, expected_batch_size=None, loss_reduction="sum"
    )

    def step() -> None:
        DPTensorFastGradientClipping(hooks, optimizer, losses(), "sum").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --------------------------------------------------------------------------------------------------------------- time


def times(cell: Cell, arms: Sequence[str], pairs: int) -> dict[str, Any]:
    """Spread of the ratios to the non-private step of the same round."""
    ratios: dict[str, dict[str, list[float]]] = {arm: {"wall": [], "cpu": []} for arm in arms}
    plain: list[float] = []
    order = random.Random(0)
    with ExitStack() as stack:
        steps = {arm: stack.enter_context(stepping(arm, cell)) for arm in arms}
        for done in range(-2, pairs):  # two rounds warm up
            taken = {arm: _timed(steps[arm], cell) for arm in order.sample(arms, len(arms))}
            if done >= 0:
                plain.append(taken["none"][0])
                for arm in arms:
                    ratios[arm]["wall"].append(taken[arm][0] / taken["none"][0])
                    ratios[arm]["cpu"].append(taken[arm][1] / taken["none"][1])
    table = {arm: {clock: _spread(values) for clock, values in ratios[arm].items()} for arm in arms if arm != "none"}
    return {"pairs": pairs, "plain_step_seconds": _spread(plain), "time": table}


def _timed(step: Callable[[], None], cell: Cell) -> tuple[float, float]:
    """Wall and CPU seconds of one step."""
    if cell.device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if cell.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    bound = upper_bound(values)
    return {
        "min": round(min(values), 4),
        "median": round(statistics.median(values), 4),
        "upper": None if bound is None else round(bound, 4),
        "max": round(max(values), 4),
    }


def upper_bound(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """The k-th smallest value with P(Binomial(n, 1/2) < k) ≥ confidence; ``None`` if there are too few values."""
    below = 0.0
    for k, value in enumerate(sorted(values)):
        if below >= confidence:
            return value
        below += math.comb(len(values), k) / 2.0 ** len(values)
    return None


# ------------------------------------------------------------------------------------------------------------- memory


def memory(cell: Cell, arms: Sequence[str]) -> dict[str, Any]:
    """Peak of each arm's step in MiB, in both ways, and its ratio to the non-private one."""
    found = {arm: _in_a_process(cell, arm) for arm in arms}
    return {
        arm: {kind: {"mib": round(mib, 1), "ratio": round(mib / found["none"][kind], 4)} for kind, mib in peaks.items()}
        for arm, peaks in found.items()
    }


def _in_a_process(cell: Cell, arm: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--peak", arm, "--cells", cell.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def peak(cell: Cell, arm: str) -> dict[str, float]:
    """Peak MiB of this process's step."""
    with stepping(arm, cell) as step:
        if cell.device.type == "cuda":
            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return {"tensors": (torch.cuda.max_memory_allocated() - before) / 2**20}
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark starts anew
        for _ in range(3):
            step()
        resident = _resident("VmHWM") - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            step()
    held = highest = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return {"tensors": highest / 2**20, "resident": resident}


def _resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# --------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Runs the chosen cells and merges them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="rounds of each cell")
    parser.add_argument("--cells", default="*", help="which cells, e.g. 'b16-*'")
    parser.add_argument("--arms", default=",".join(ARMS), help="which arms besides none")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--dry", action="store_true", help="print and write nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cells = [cell for cell in CELLS if fnmatch(cell.name, arguments.cells)]
    if arguments.peak:
        print(json.dumps(peak(cells[0], arguments.peak)))
        return
    arms = [arm for arm in ARMS if arm == "none" or arm in arguments.arms.split(",")]
    for cell in cells:
        if cell.device.type == "cuda" and not torch.cuda.is_available():
            print(f"{cell.name}: skipped, there is no CUDA device", file=sys.stderr)
            continue
        result = times(cell, arms, arguments.pairs)
        if not arguments.no_memory:
            result["memory"] = memory(cell, arms)
        result["environment"] = environment()
        print(json.dumps({cell.name: result}, indent=2))
        if not arguments.dry:
            _merge(cell.name, result)


def _merge(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    stored = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    order = [cell.name for cell in CELLS]
    merged = {**stored, name: result}
    merged = {each: merged[each] for each in sorted(merged, key=order.index)}
    OUT.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
