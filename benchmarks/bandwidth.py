"""Bytes on the wire: what a site is sent, and sends, in a round of LoRA training, by algorithm and number format.

    python benchmarks/bandwidth.py

Nothing is trained: a release is Gaussian noise, as a private one nearly is, which is also the hardest to deflate. All
else is the product's own: the server's aggregator moves the global adapter, requests and releases are made, encoded and
packed as in a deployment, and the packed bytes are counted, names and scales included. The header of a message (run,
digests, the signed head of the audit log: some hundred bytes) is not.

Two layouts, both rank 8 on query and value of all layers: MiniLM (6 layers of 384) with a head of 11 classes that an
earlier phase has trained, and a Llama of 1B (16 layers of 2048, 8 key-value heads of 64). Only their shapes are there.
A figure is the mean over rounds 3 to 8 of the phase; ratios are to FedIT in fp32 with every tensor in every message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment
from safetensors.numpy import load, save
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from client import egress
from client.privacy.sampling import RoundSecret
from common import number_formats, wire
from common.adapted import AdaptedModel
from common.algorithms import LOCAL_RULES
from common.messages import Release, parted
from common.model import BaseModel, Placement
from common.plan import Plan
from common.requests import RoundRequest, moved_by_server, starts_orthonormal
from common.sections import LoraSection, PhaseSection, PrivacySection, TaskSection, WireSection
from common.tasks.registry import task_of
from server.aggregation.registry import aggregator_for

ALGORITHMS = ("fedit", "ffa", "fedsvd", "rolora", "la-lora", "flexlora", "fedex")
FORMATS: tuple[number_formats.NumberFormat, ...] = ("fp32", "bf16", "int8")
ROUNDS, COUNTED, SITES, RANK, DEVIATION = 8, range(3, 9), 3, 8, 0.01
CLASSES = tuple(f"class {index}" for index in range(11))


def minilm() -> AdaptedModel:
    """A classifier of MiniLM's shape."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=len(CLASSES)
    )
    task = TaskSection(name="sequence-classification", labels=CLASSES, max_length=128, pooling="mean", head_init="zero")
    return _shaped(BertForSequenceClassification, config, task, "mean")


def llama() -> AdaptedModel:
    """A language model of the shape of a Llama of 1B."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        tie_word_embeddings=True,
    )
    return _shaped(LlamaForCausalLM, config, TaskSection(name="causal-lm", max_length=128), "model")


def _shaped(network: Any, config: Any, settings: TaskSection, pooling: str) -> AdaptedModel:
    with torch.device("meta"):
        empty = network(config).requires_grad_(False)
        base = BaseModel(empty, None, "0" * 64, Placement.choose("cpu"), pooling)  # type: ignore[arg-type]
        return AdaptedModel(base, task_of(settings), LoraSection(r=RANK))


def plan_of(model: AdaptedModel, algorithm: str, form: number_formats.NumberFormat) -> tuple[Plan, int]:
    """A plan whose last phase is the one that counts, and that phase's first round."""
    lora = PhaseSection(name="lora", rounds=ROUNDS + 1, sample_rate=1.0, algorithm=algorithm, train=("lora",))
    head = PhaseSection(name="head", rounds=1, sample_rate=1.0, train=("head",))
    phases = (lora,) if model.task.name == "causal-lm" else (head, lora)
    plan = Plan(
        run_id="bandwidth",
        seed=0,
        data="default",
        model_digest=model.base.digest,
        task=model.task.settings,  # type: ignore[attr-defined]
        lora=model.lora,
        privacy=PrivacySection(),
        phases=phases,
        wire=WireSection(down=form, up=form),
        adapter_digest=model.spec.digest(),
        code_digest="0" * 64,
    )
    return plan, len(phases)


def exchanged(
    model: AdaptedModel, algorithm: str, form: number_formats.NumberFormat
) -> Iterator[tuple[int, float, float]]:
    """(round of the phase, bytes down, bytes up) of one site, round by round."""
    plan, first = plan_of(model, algorithm, form)
    phase, generator = plan.phases[-1], np.random.default_rng(0)
    aggregator = aggregator_for(phase)
    state = aggregator.init(model.initial_state(plan.seed, starts_orthonormal(plan.phases)))
    turned = ("A", "B") if moved_by_server(phase) else ()
    feeds_back = frozenset(name for name in model.spec.names if model.group_of(name) not in turned)
    residuals: list[bytes | None] = [None] * SITES
    held: dict[str, str] = {}
    for index in range(1, ROUNDS + 1):
        saved = aggregator.save(state)
        adapter = {name.removeprefix("adapter/"): one for name, one in saved.items() if name.startswith("adapter/")}
        request = RoundRequest.of(plan, model, first + index - 1, adapter)
        down = wire.size_of(wire.train_request_to_record(request.to(held)))
        held, up = dict(request.confirmed), []
        spec = model.spec.part(model.trained_in(phase, index))
        for site in range(SITES):
            secret = RoundSecret.fixed(0, str(site), index)
            rounding = egress.Rounding(
                form, lambda name, n, secret=secret: secret.uniform(name, 0, n), residuals[site], feeds_back
            )
            noise = {
                name: DEVIATION * generator.standard_normal(shape).astype(np.float32) for name, shape in spec.shapes
            }
            outgoing = egress.release(noise, spec, rounding=rounding)
            residuals[site] = outgoing.residual
            update, metrics = parted(load(outgoing.payload))
            reply = Release(str(site), plan.run_id, index, request.digest(), update, "", metrics)
            record = wire.train_reply_to_record(reply)
            up.append(wire.size_of(record))
            arrived = wire.train_reply_from_record(record)
            assert isinstance(arrived, Release)
            state = aggregator.accumulate(state, number_formats.decode(arrived.update, spec, form), 1.0)
        state, _ = aggregator.finish(state)
        yield index, down, sum(up) / SITES


def table(results: dict[str, Any]) -> str:
    """KiB per round and direction, and the share of FedIT in fp32, as Markdown."""
    lines = []
    for layout, cells in results["layouts"].items():
        everything = cells["everything in fp32"]
        lines += [
            f"**{layout}** (all of A, B and head in fp32: {everything / 1024:.1f} KiB)",
            "",
            "| algorithm | " + " | ".join(f"{form} down | up" for form in FORMATS) + " |",
            "|---|" + "---|" * 2 * len(FORMATS),
        ]
        for algorithm in ALGORITHMS:
            row = []
            for form in FORMATS:
                for way in ("down", "up"):
                    size, share = cells[algorithm][form][way], cells[algorithm][form][f"share {way}"]
                    row.append(f"{size / 1024:.1f} (1/{1 / share:.1f})")
            lines.append(f"| {algorithm} | " + " | ".join(row) + " |")
        lines.append("")
    lines.append(f"KiB of one site in one round. Measured with `{json.dumps(results['environment'])}`.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes results/bandwidth.json and bandwidth.md, and prints the table."""
    assert set(ALGORITHMS) == set(LOCAL_RULES)
    results: dict[str, Any] = {"environment": environment(), "layouts": {}}
    for layout, model in (("MiniLM, rank 8", minilm()), ("Llama 1B, rank 8", llama())):
        zeros = {name: np.zeros(shape, np.float32) for name, shape in model.spec.shapes}
        cells: dict[str, Any] = {"everything in fp32": len(save(zeros))}
        for algorithm in ALGORITHMS:
            cells[algorithm] = {}
            for form in FORMATS:
                counted = [entry for entry in exchanged(model, algorithm, form) if entry[0] in COUNTED]
                cells[algorithm][form] = {
                    "down": round(sum(entry[1] for entry in counted) / len(counted)),
                    "up": round(sum(entry[2] for entry in counted) / len(counted)),
                }
        whole = cells["fedit"]["fp32"]
        for algorithm in ALGORITHMS:
            for cell in cells[algorithm].values():
                cell.update({f"share {way}": round(cell[way] / whole[way], 4) for way in ("down", "up")})
        results["layouts"][layout] = cells
    (RESULTS / "bandwidth.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "bandwidth.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
