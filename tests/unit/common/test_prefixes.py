"""The frozen-prefix cache: the same gradients as without it, found again after a restart, and never a half file."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.adapted import AdaptedModel
from common.adapter import AdapterState
from common.cuts import INPUT, Cut
from common.examples import FEATURE_ROWS, Batch, Examples
from common.prefix_files import HEADER, PrefixCache, cache_folder, wipe, wipe_outdated
from common.prefixes import Layout, Prefixes
from common.tasks.base import Encoded

Load = Callable[..., AdaptedModel]
Draw = Callable[..., AdapterState]

FEATURES = Cut(None)
ROWS = 4


def encoded(model: AdaptedModel, n: int = 9, seed: int = 0) -> list[Encoded | None]:
    """Random tokens of ragged lengths in several buckets; the fourth row is void."""
    generator = np.random.default_rng(seed)
    items: list[Encoded | None] = []
    for length in generator.integers(3, 60, n):
        ids = generator.integers(6, 240, length).astype(np.int32)
        target = ids.astype(np.int64) if model.task.name == "causal-lm" else np.asarray(generator.integers(3), np.int64)
        items.append(Encoded(ids, target))
    items[3:4] = [None] * len(items[3:4])
    return items


def batches(examples: Examples, model: AdaptedModel, cut: Cut, rows: int = ROWS) -> list[Batch]:
    return list(examples.batches(np.arange(len(examples)), rows, model, cut))


def inputs(examples: Examples, model: AdaptedModel, cut: Cut) -> list[torch.Tensor]:
    """What the top gets of the examples that can be learnt from, without the padding."""
    found = {}
    for batch in batches(examples, model, cut):
        for row, index in enumerate(batch.indices.tolist()):
            if (item := examples.encoded[index]) is not None:
                found[index] = batch.inputs[row] if cut == FEATURES else batch.inputs[row, : len(item.ids)]
    return [found[index] for index in sorted(found)]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@contextmanager
def frozen_calls(model: AdaptedModel) -> Iterator[list[str]]:
    """Names of the embeddings and of the layers below the first adapted one, each time one of them runs."""
    encoder: Any = model.base.encoder
    layers = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
    embeddings = encoder.embeddings.word_embeddings if hasattr(encoder, "embeddings") else encoder.embed_tokens
    watched = {"embeddings": embeddings, **{f"layer {i}": layers[i] for i in range(model.first_adapted)}}
    calls: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[misc]
        for name, module in watched.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def gradients(model: AdaptedModel, examples: Examples, cut: Cut) -> dict[str, torch.Tensor]:
    """Of the summed loss of all examples, with respect to head and adapter."""
    with model.training(model.spec.names) as parameters:
        for batch in batches(examples, model, cut):
            losses = model.task.per_example_loss(model.top(batch.inputs, batch.mask, cut), batch.targets)
            (losses * batch.weights).sum().backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.fixture(scope="module")
def model(tiny_bert: Path, adapted_model: Load) -> AdaptedModel:
    return adapted_model(tiny_bert, lora={"layers": 2}, max_length=96)


@pytest.fixture(scope="module")
def items(model: AdaptedModel) -> list[Encoded | None]:
    return encoded(model)


@pytest.fixture(scope="module")
def anew(model: AdaptedModel, items: list[Encoded | None]) -> list[torch.Tensor]:
    """The hidden states as they are without any cache."""
    return inputs(Examples(items, model.task, cache_limit=0), model, model.layer_cut)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "cache" / "data-notes"


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the same as without --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["bert", "llama", "causal-lm"])
def test_gradients_from_the_cache_are_those_of_the_whole_model(
    family: str, layers: int, tiny_bert: Path, tiny_llama: Path, folder: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    task = {"name": "causal-lm", "labels": ()} if family == "causal-lm" else {}
    model = adapted_model(tiny_bert if family == "bert" else tiny_llama, lora={"layers": layers}, **task)
    model.load(random_adapter(model))
    items = encoded(model)
    expected = gradients(model, Examples(items, model.task), INPUT)
    assert set(expected) == set(model.spec.names)
    for _ in range(2):  # as computed, and as found again
        examples = Examples(items, model.task, cache_folder=folder)
        for name, gradient in gradients(model, examples, model.layer_cut).items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=1e-5)
            assert scale > 1e-3


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_nothing_below_the_first_adapted_layer_runs_once_the_cache_is_there(
    family: str, tiny_bert: Path, tiny_llama: Path, folder: Path, adapted_model: Load, random_adapter: Draw
) -> None:
    model = adapted_model({"bert": tiny_bert, "llama": tiny_llama}[family], lora={"layers": 1})
    model.load(random_adapter(model))
    cut, items = model.layer_cut, encoded(model)
    with frozen_calls(model) as calls:
        batches(Examples(items, model.task, cache_folder=folder), model, cut)
        assert set(calls) == {"embeddings", *(f"layer {i}" for i in range(model.first_adapted))}
        calls.clear()
        gradients(model, Examples(items, model.task, cache_folder=folder), cut)
        assert calls == []


def test_adapters_in_all_layers_are_trained_without_a_cache(tiny_bert: Path, folder: Path, adapted_model: Load) -> None:
    model = adapted_model(tiny_bert)
    assert model.layer_cut == INPUT
    examples = Examples(encoded(model), model.task, cache_folder=folder)
    gradients(model, examples, model.layer_cut)
    assert not folder.exists()


@pytest.mark.parametrize("cut", [Cut(2), FEATURES], ids=["hidden states", "features"])
def test_on_disk_in_memory_and_without_a_cache_are_bit_for_bit_the_same(
    cut: Cut, model: AdaptedModel, items: list[Encoded | None], anew: list[torch.Tensor], folder: Path
) -> None:
    in_memory = inputs(Examples(items, model.task), model, cut)
    for _ in range(2):
        assert_same(inputs(Examples(items, model.task, cache_folder=folder), model, cut), in_memory)
    if cut != FEATURES:
        assert_same(in_memory, anew)


def test_some_examples_come_as_they_do_among_all(model: AdaptedModel, folder: Path) -> None:
    """Features of neighbours are read together; here some are, and some are not."""
    items = encoded(model, 40)
    chosen = np.array([0, 1, 2, 7, 9, 10, 39])
    examples = Examples(items, model.task, cache_folder=folder)
    for cut in (FEATURES, model.layer_cut):
        whole = {int(i): b.inputs[row] for b in batches(examples, model, cut) for row, i in enumerate(b.indices)}
        for batch in examples.batches(chosen, ROWS, model, cut):
            for row, index in enumerate(batch.indices.tolist()):
                assert torch.equal(batch.inputs[row], whole[index])
            assert not batch.inputs[len(batch.indices) :].any()
    (batch,) = examples.batches(chosen, ROWS, model, FEATURES)
    assert batch.indices.tolist() == chosen.tolist()
    assert len(batch.inputs) == FEATURE_ROWS


def test_a_bfloat16_model_keeps_its_own_bits_in_half_the_space(
    tiny_bert: Path, folder: Path, tmp_path: Path, adapted_model: Load
) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model = adapted_model(tiny_bert, lora={"layers": 2}, dtype=dtype)
        items, place = encoded(model), tmp_path / dtype
        first = inputs(Examples(items, model.task, cache_folder=place), model, model.layer_cut)
        again = inputs(Examples(items, model.task, cache_folder=place), model, model.layer_cut)
        assert_same(again, first)
        assert_same(again, inputs(Examples(items, model.task, cache_limit=0), model, model.layer_cut))
        assert {tensor.dtype for tensor in again} == {model.base.placement.dtype}
        sizes[dtype] = (place / "layer2.prefixes").stat().st_size - HEADER
    tokens = sum(len(item.ids) for item in items if item is not None)
    assert sizes == {"float32": tokens * 32 * 4, "bfloat16": tokens * 32 * 2}


# ---- on disk --------------------------------------------------------------------------------------------------------


def test_after_a_restart_nothing_is_computed_anew(
    model: AdaptedModel, items: list[Encoded | None], folder: Path
) -> None:
    first = Examples(items, model.task, cache_folder=folder)
    expected = inputs(first, model, model.layer_cut), inputs(first, model, FEATURES)
    layers: Any = model.base.encoder.encoder.layer  # type: ignore[union-attr]
    calls: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    again = Examples(items, model.task, cache_folder=folder)
    assert_same(inputs(again, model, FEATURES), expected[1])
    assert_same(inputs(again, model, model.layer_cut), expected[0])
    for hook in hooks:
        hook.remove()
    assert calls == []


def test_only_the_sites_own_user_can_read_it_and_names_tell_nothing(
    model: AdaptedModel, items: list[Encoded | None], folder: Path
) -> None:
    folder.mkdir(parents=True, mode=0o755)
    before = os.umask(0)
    try:
        examples = Examples(items, model.task, cache_folder=folder)
        for cut in (model.layer_cut, FEATURES):
            batches(examples, model, cut)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "layer2.prefixes": 0o600,
        "features.prefixes": 0o600,
    }


def test_a_kill_while_it_is_computed_leaves_nothing_that_is_taken_for_whole(
    model: AdaptedModel,
    items: list[Encoded | None],
    anew: list[torch.Tensor],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The folder is copied at every write to a file, and right before the file gets its name."""
    states: list[Path] = []
    write, replace = os.pwrite, os.replace

    def copied() -> None:
        states.append(tmp_path / f"after-{len(states)}")
        shutil.copytree(folder, states[-1])

    def watched_write(*arguments: Any) -> int:
        done = write(*arguments)
        copied()
        return done

    def watched_replace(*arguments: Any) -> None:
        copied()
        replace(*arguments)

    monkeypatch.setattr(os, "pwrite", watched_write)
    monkeypatch.setattr(os, "replace", watched_replace)
    batches(Examples(items, model.task, cache_folder=folder), model, model.layer_cut)
    monkeypatch.undo()
    assert len(states) == 8 + 1 + 1  # examples that are not void, the header, the name
    for state in states:
        (left,) = state.iterdir()
        assert left.suffix == ".part"
        with frozen_calls(model) as calls:
            assert_same(inputs(Examples(items, model.task, cache_folder=state), model, model.layer_cut), anew)
        assert calls
        assert kept(state) == ["layer2.prefixes"]


def test_an_interruption_leaves_no_file_at_all(
    model: AdaptedModel, items: list[Encoded | None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Prefixes, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batches(Examples(items, model.task, cache_folder=folder), model, model.layer_cut)
    assert kept(folder) == []


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def of_version(content: bytes, version: int) -> bytes:
    header = {**json.loads(content[:HEADER]), "schema_version": version}
    return json.dumps(header).encode().ljust(HEADER) + content[HEADER:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "header alone": lambda content: content[:HEADER],
    "cut by one byte": lambda content: content[:-1],
    "longer by one byte": lambda content: content + b"\0",
    "first bit of the values": lambda content: flipped(content, HEADER),
    "last bit of the values": lambda content: flipped(content, len(content) - 1),
    "values of zero": lambda content: content[:HEADER] + bytes(len(content) - HEADER),
    "no header": lambda content: bytes(HEADER) + content[HEADER:],
    "another kind of JSON": lambda content: b"[]".ljust(HEADER) + content[HEADER:],
    "not UTF-8": lambda content: b"\xff" * HEADER + content[HEADER:],
    "of a newer version": lambda content: of_version(content, 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_anew_and_never_used(
    damage: str, model: AdaptedModel, items: list[Encoded | None], anew: list[torch.Tensor], folder: Path
) -> None:
    batches(Examples(items, model.task, cache_folder=folder), model, model.layer_cut)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert_same(inputs(Examples(items, model.task, cache_folder=folder), model, model.layer_cut), anew)
    assert file.read_bytes() == whole


def test_another_model_other_data_or_other_settings_never_find_it_and_take_its_place(
    tiny_bert: Path, tiny_llama: Path, folder: Path, adapted_model: Load
) -> None:
    first = adapted_model(tiny_bert, lora={"layers": 2}, max_length=96)
    items = encoded(first)
    fewer = [item if index else None for index, item in enumerate(items)]
    moved = [items[1], items[0], *items[2:]]
    one, two = items[1], items[2]
    assert one is not None and two is not None
    shorter, longer = Encoded(one.ids[:-1], one.target), Encoded(np.append(one.ids[-1:], two.ids), two.target)
    others: dict[str, tuple[AdaptedModel, list[Encoded | None], int]] = {
        "model": (adapted_model(tiny_llama, lora={"layers": 1}, max_length=96), items, ROWS),
        "one row less": (first, fewer, ROWS),
        "order": (first, moved, ROWS),
        "where an example ends": (first, [items[0], shorter, longer, *items[3:]], ROWS),
        "max_length": (adapted_model(tiny_bert, lora={"layers": 2}, max_length=95), items, ROWS),
        "number format": (adapted_model(tiny_bert, lora={"layers": 2}, max_length=96, dtype="bfloat16"), items, ROWS),
        "physical batch": (first, items, 3),
        "pooling": (adapted_model(tiny_bert, lora={"layers": 2}, max_length=96, pooling="cls"), items, ROWS),
    }
    for name, (model, its_items, rows) in others.items():
        for cut in (first.layer_cut, FEATURES):
            batches(Examples(items, first.task, cache_folder=folder), first, cut)
        assert kept(folder) == ["features.prefixes", "layer2.prefixes"], name
        with frozen_calls(model) as calls:
            batches(Examples(its_items, model.task, cache_folder=folder), model, model.layer_cut, rows)
        assert calls, name
        assert kept(folder) == [f"{model.layer_cut.key()}.prefixes"], name


def test_targets_do_not_matter_since_nothing_depends_on_them(
    model: AdaptedModel, items: list[Encoded | None], folder: Path
) -> None:
    batches(Examples(items, model.task, cache_folder=folder), model, model.layer_cut)
    corrected = [None if item is None else Encoded(item.ids, np.asarray(2, np.int64)) for item in items]
    with frozen_calls(model) as calls:
        batches(Examples(corrected, model.task, cache_folder=folder), model, model.layer_cut)
    assert calls == []


def test_an_example_that_failed_is_tried_again_after_a_restart(
    model: AdaptedModel,
    items: list[Encoded | None],
    anew: list[torch.Tensor],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert items[0] is not None
    broken, prefix = int(items[0].ids[0]), model.prefix

    def failing(ids: torch.Tensor, mask: torch.Tensor, cut: Cut) -> torch.Tensor:
        if bool((ids[:, 0] == broken).any()):
            raise RuntimeError("out of memory")
        return prefix(ids, mask, cut)

    with monkeypatch.context() as patched:
        patched.setattr(model, "prefix", failing)
        examples = Examples(items, model.task, cache_folder=folder)
        first = inputs(examples, model, model.layer_cut)
    assert first[0].isnan().all()
    assert_same(first[1:], anew[1:])
    with frozen_calls(model) as calls:
        assert_same(inputs(examples, model, model.layer_cut)[1:], anew[1:])
    assert calls == [], "it is used for as long as this process lives"
    assert kept(folder) == []
    assert_same(inputs(Examples(items, model.task, cache_folder=folder), model, model.layer_cut), anew)
    assert kept(folder) == ["layer2.prefixes"]


# ---- no room --------------------------------------------------------------------------------------------------------


def fail(number: int) -> Callable[..., Any]:
    def failing(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


FULL: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "no room from the start": lambda patch, folder: patch.setattr(os, "posix_fallocate", fail(28)),
    "no room while writing": lambda patch, folder: patch.setattr(os, "pwrite", fail(28)),
    "half a write": lambda patch, folder: patch.setattr(os, "pwrite", lambda *_: 1),
    "no sync": lambda patch, folder: patch.setattr(os, "fsync", fail(5)),
    "the ledger would have no room": lambda patch, folder: patch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, (1 << 40) - (1 << 30), 1 << 30)  # type: ignore[attr-defined]
    ),
    "not a folder": lambda patch, folder: (folder.parent.mkdir(parents=True), folder.touch())[1],
    "read only": lambda patch, folder: patch.setattr("tempfile.mkstemp", lambda **_: fail(30)()),
}  # fmt: skip


@pytest.mark.parametrize("cause", FULL)
def test_whatever_is_wrong_with_the_disk_batches_come_as_without_a_cache(
    cause: str,
    model: AdaptedModel,
    items: list[Encoded | None],
    anew: list[torch.Tensor],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = inputs(Examples(items, model.task), model, FEATURES)
    with monkeypatch.context() as patched:
        FULL[cause](patched, folder)
        examples = Examples(items, model.task, cache_folder=folder)
        with caplog.at_level(logging.WARNING):
            assert_same(inputs(examples, model, model.layer_cut), anew)
            assert_same(inputs(examples, model, FEATURES), expected)
            assert_same(inputs(examples, model, model.layer_cut), anew)
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
            "the frozen activations are not kept, so their layers run in every step",
            "the frozen features are kept in memory alone",
        ]
        assert str(folder) not in caplog.text
    assert not folder.is_dir() or kept(folder) == []


@pytest.mark.parametrize("room", [True, False])
def test_a_cache_is_as_large_as_its_limit_allows_and_no_larger(
    room: bool, model: AdaptedModel, items: list[Encoded | None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = sum(len(item.ids) for item in items if item is not None)
    limit = HEADER + tokens * 32 * 4 - (not room)
    examples = Examples(items, model.task, cache_limit=limit, cache_folder=folder)
    with frozen_calls(model) as calls, caplog.at_level(logging.WARNING):
        batches(examples, model, model.layer_cut)
        calls.clear()
        batches(examples, model, model.layer_cut)
    assert (calls == []) == room
    assert kept(folder) == (["layer2.prefixes"] if room else [])
    assert ("exceed the cache limit of 0.00 GiB" in caplog.text) != room
    batches(examples, model, FEATURES)  # beside a full cache they are kept in memory
    assert "features.prefixes" not in kept(folder) or not room


@pytest.mark.parametrize("cut", [Cut(2), FEATURES], ids=["hidden states", "features"])
def test_a_file_that_breaks_under_training_changes_no_batch(
    cut: Cut, model: AdaptedModel, items: list[Encoded | None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = Examples(items, model.task, cache_folder=folder)
    expected = inputs(examples, model, cut)
    for file in folder.glob(f"{cut.key()}.*"):
        os.truncate(file, HEADER + 100)
    for _ in range(2):
        assert_same(inputs(examples, model, cut), expected)
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "the frozen activations can no longer be read (the file has been cut short) and are computed anew"
    )


def test_no_examples_need_no_file(model: AdaptedModel, folder: Path) -> None:
    examples = Examples([], model.task, cache_folder=folder)
    assert [batches(examples, model, cut) for cut in (model.layer_cut, FEATURES)] == [[], []]
    assert not folder.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
def test_memory_does_not_grow_with_what_is_read(folder: Path) -> None:
    layout = Layout(np.full(1000, 64), 384, torch.float32)  # 94 MiB
    values = torch.zeros(8, 64, 384)

    def fill(prefixes: Prefixes) -> None:
        for start in range(0, 1000, 8):
            prefixes.put(np.arange(start, start + 8), values + start)

    def resident() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) >> 10

    before = resident()
    cache = PrefixCache(1 << 30, folder)
    cache.make(Cut(1), "origin", layout, fill)
    found = cache.find(Cut(1), "origin", layout)
    assert found is not None
    for start in range(0, 1000, 8):
        hidden = found.padded(np.arange(start, start + 8), 8, 64)
        assert hidden is not None
        assert bool((hidden == start).all())
    assert resident() - before < 47, "MiB: half of it"


# ---- wiped with the data --------------------------------------------------------------------------------------------


def test_a_withdrawn_data_set_is_wiped_alone(model: AdaptedModel, items: list[Encoded | None], tmp_path: Path) -> None:
    folders = [cache_folder(tmp_path, name) for name in ("notes", "../notes", "..")]
    assert [folder.parent for folder in folders] == [tmp_path] * 3
    for folder in folders:
        batches(Examples(items, model.task, cache_folder=folder), model, model.layer_cut)
    wipe(folders[1])
    assert [folder.exists() for folder in folders] == [True, False, True]
    wipe(folders[1])
    batches(Examples(items, model.task, cache_folder=folders[1]), model, model.layer_cut)
    assert kept(folders[1]) == ["layer2.prefixes"]


def test_rows_deleted_from_a_file_are_wiped_at_the_next_start(
    model: AdaptedModel, items: list[Encoded | None], tmp_path: Path
) -> None:
    root, notes, scans = tmp_path / "cache", tmp_path / "notes.csv", tmp_path / "scans.csv"
    notes.write_text("a\nb\n")
    scans.write_text("a\nb\n")
    both = {"notes": [notes], "scans": [scans]}

    def held() -> dict[str, int]:
        return {folder.name: len(list(folder.glob("*.prefixes"))) for folder in root.iterdir()}

    wipe_outdated(root, both)
    for name in both:
        batches(Examples(items, model.task, cache_folder=cache_folder(root, name)), model, model.layer_cut)
    wipe_outdated(root, both)
    assert held() == {"data-notes": 1, "data-scans": 1}
    notes.write_text("a\n")
    wipe_outdated(root, both)
    assert held() == {"data-notes": 0, "data-scans": 1}
    assert (root / "data-notes" / "source").stat().st_mode & 0o777 == 0o600
    wipe_outdated(root, {"notes": [notes]})
    assert held() == {"data-notes": 0}
