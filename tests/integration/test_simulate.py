"""`consilium simulate` and `consilium predict` as a user calls them, on small models and small data."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import consilium
from common.model import pool
from server.evaluation import Evaluator

LABELS = ["urgent", "routine", "review"]
PHASES = """
[[phase]]
name = "head"
rounds = 3
sample_rate = 1.0
train = ["head"]
learning_rate = 2.0
server_momentum = 0.9

[[phase]]
name = "lora"
rounds = 2
steps = 2
sample_rate = 0.5
train = ["head", "lora"]
"""


@pytest.fixture
def run_toml(tmp_path: Path, tiny_bert: Path, triage_data: Path) -> Path:
    """Settings of a small run: three sites, two phases, epsilon 8."""
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
[model]
name = "{tiny_bert}"
[task]
name = "sequence-classification"
labels = {json.dumps(LABELS)}
max_length = 32
[data]
path = "{triage_data}"
site_column = "hospital"
[lora]
r = 4
layers = 2
{PHASES}""",
        encoding="utf-8",
    )
    return path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `consilium` in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        try:
            consilium.main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code or 0
        output = capsys.readouterr()
        return int(code), output.out, output.err

    return call


def test_a_run_leaves_behind_everything_that_is_promised(command: Command, run_toml: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, _ = command("simulate", "--config", run_toml, "--out", out)
    assert code == 0
    assert "Global model by round" in stdout and str(out / "adapter") in stdout
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in rounds] == [0, 1, 2, 3, 4, 5]
    assert [record["phase"] for record in rounds] == ["base", "head", "head", "head", "lora", "lora"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == rounds
    assert set(summary["sites"]) == {"north", "south", "west"}
    for entry in summary["sites"].values():
        privacy = entry["privacy"]
        assert 7.9 < privacy["epsilon"] <= 8.0
        assert (privacy["delta"], privacy["unit"], privacy["accountant"]) == (1e-5, "example", "prv")
        assert privacy["steps"] == 3 + 2 * 2
        assert [(p["name"], p["sample_rate"], p["steps"]) for p in privacy["phases"]] == [
            ("head", 1, 3),
            ("lora", 0.5, 4),
        ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["evaluation_data_digests"]) == {"validation", "test"}
    assert len(manifest["code_digest"]) == len(manifest["model_digest"]) == 64
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert len(events.Scalars("validation/accuracy")) == 6
    assert (out / "run.toml").is_file() and (out / "checkpoint" / "LATEST").read_text() == "5"


def test_only_what_a_round_trains_is_sent_up_and_only_what_was_trained_is_sent_down(
    command: Command, run_toml: Path, tmp_path: Path
) -> None:
    command("simulate", "--config", run_toml, "--out", tmp_path / "out")
    rounds = json.loads((tmp_path / "out" / "summary.json").read_text())["rounds"]
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    head = {name: array for name, array in adapter.items() if ".lora_" not in name}
    trained = {**head, **{name: array for name, array in adapter.items() if ".lora_B." in name}}
    assert sum(array.size for array in head.values()) == 3 * 32 + 3  # weight and bias
    assert sum(array.size for array in trained.values()) == 3 * 32 + 3 + 2 * 2 * 32 * 4  # layers × (query, value) × B
    nothing, of_head, of_both = (3 * len(save(tensors)) for tensors in ({}, head, trained))
    assert [rounds[number]["bytes_up"] for number in range(1, 6)] == [of_head] * 3 + [of_both] * 2
    assert [rounds[number]["bytes_down"] for number in range(1, 6)] == [nothing, of_head, of_head, of_head, of_both]


def test_the_adapter_is_plain_peft_and_gives_the_same_answers(
    command: Command, run_toml: Path, tmp_path: Path, tiny_bert: Path
) -> None:
    out = tmp_path / "out"
    command("simulate", "--config", run_toml, "--out", out)
    texts = ["crushing chest pain", "mild cough for two days"]
    inputs = tmp_path / "notes.csv"
    inputs.write_text("text\n" + "\n".join(texts) + "\n", encoding="utf-8")
    code, stdout, _ = command("predict", "--adapter", out / "adapter", "--input", inputs)
    assert code == 0
    answers = [json.loads(line) for line in stdout.splitlines()]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=len(LABELS))
    peft = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    batch = AutoTokenizer.from_pretrained(tiny_bert)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = peft.base_model.model.bert(**batch).last_hidden_state
        logits = peft.base_model.model.classifier(pool(states, batch["attention_mask"], "mean"))
    for answer, row in zip(answers, logits.softmax(-1).tolist(), strict=True):
        assert [answer["probabilities"][label] for label in LABELS] == pytest.approx(row, abs=2e-6)
        assert answer["label"] == LABELS[int(np.argmax(row))]


def test_the_same_seeds_give_the_same_bits_and_another_site_seed_does_not(
    command: Command, run_toml: Path, tmp_path: Path
) -> None:
    adapters = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command("simulate", "--config", run_toml, "--out", tmp_path / name, "--set", f"simulation.seed={seed}")
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(np.array_equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any(not np.array_equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


def test_a_comparison_shows_base_best_site_and_both_federations_on_test(
    command: Command, run_toml: Path, tmp_path: Path
) -> None:
    code, stdout, _ = command(
        "simulate", "--config", run_toml, "--out", tmp_path / "out", "--set", "simulation.compare=true", "--json"
    )
    assert code == 0
    comparison = json.loads(stdout)["comparison"]
    assert list(comparison) == ["base", "best_single_site", "federated", "federated_without_privacy"]
    assert comparison["best_single_site"]["site"] in {"north", "south", "west"}
    assert all("accuracy" in row["test"] for row in comparison.values())
    for name in ("no-privacy", "alone-north", "alone-south", "alone-west"):
        assert (tmp_path / "out" / "arms" / name / "rounds.jsonl").is_file()
        assert list((tmp_path / "out" / "arms" / name / "sites").iterdir())


@pytest.mark.parametrize("compare", [False, True])
def test_the_finished_adapter_is_scored_on_the_test_split_once(
    compare: bool, command: Command, run_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[str, bytes]] = []
    scores = Evaluator.scores

    def noted(self: Evaluator, adapter: Any, split: str, *more: Any) -> Any:
        scored.append((split, save({name: np.ascontiguousarray(array) for name, array in adapter.items()})))
        return scores(self, adapter, split, *more)

    monkeypatch.setattr(Evaluator, "scores", noted)
    out, head = tmp_path / "out", 'phase=[{name="head", rounds=1, sample_rate=1.0, train=["head"]}]'
    settings = (head, "privacy.mechanism=none", "evaluation.metric=loss", f"simulation.compare={str(compare).lower()}")
    command("simulate", "--config", run_toml, "--out", out, *(part for one in settings for part in ("--set", one)))
    summary = json.loads((out / "summary.json").read_text())
    base, best = scored[0][1], scored[summary["best_round"]][1]
    tested = [adapter for split, adapter in scored if split == "test"]
    assert summary["best_round"] == 1 and tested.count(best) == 1
    if compare:
        assert summary["comparison"]["federated"] == {"validation": summary["validation"], "test": summary["test"]}
        assert set(summary["comparison"]["base"]["test"]) == set(summary["test"])
    else:
        assert tested == [best, base]  # the base for the figures of each site


def test_without_privacy_is_loud_and_claims_nothing(command: Command, run_toml: Path, tmp_path: Path) -> None:
    code, stdout, stderr = command(
        "simulate", "--config", run_toml, "--out", tmp_path / "out", "--set", "privacy.mechanism=none"
    )
    assert code == 0 and "NO privacy promise" in stderr and "no privacy claimed" in stdout
    sites = json.loads((tmp_path / "out" / "summary.json").read_text())["sites"]
    assert all(entry["privacy"]["epsilon"] is None for entry in sites.values())


def test_with_a_privacy_unit_everything_is_counted_in_units(
    command: Command, run_toml: Path, tmp_path: Path, triage_data: Path
) -> None:
    data = tmp_path / "by-patient"
    data.mkdir()
    for split in ("validation", "test"):  # held-out files of a folder need no such column
        (data / f"{split}.csv").write_text((triage_data / f"{split}.csv").read_text(encoding="utf-8"), encoding="utf-8")
    with (triage_data / "train.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    with (data / "train.csv").open("w", newline="", encoding="utf-8") as stream:
        table = [[*row, f"p{number // 3}"] for number, row in enumerate(rows[1:])]
        csv.writer(stream).writerows([[*rows[0], "patient"], *table])
    with (data / "train.csv").open(newline="", encoding="utf-8") as stream:
        patients = {(row["hospital"], row["patient"]) for row in csv.DictReader(stream)}
    settings = ["--set", f"data.path={data}", "--set", "data.privacy_unit=patient"]
    code, _, _ = command("simulate", "--config", run_toml, *settings, "--out", tmp_path / "out")
    assert code == 0
    for site, entry in json.loads((tmp_path / "out" / "summary.json").read_text())["sites"].items():
        assert entry["public_size"] == sum(hospital == site for hospital, _ in patients)
        assert entry["privacy"]["unit"] == "patient" and 7.9 < entry["privacy"]["epsilon"] <= 8.0
    code, _, stderr = command(
        "simulate", "--config", run_toml, "--set", "privacy.unit=patient", "--out", tmp_path / "no column"
    )
    assert code == 2 and "data.privacy_unit: is missing" in stderr
    (data / "train.csv").write_text("text,label,hospital,patient\nfever,urgent,north,\n", encoding="utf-8")
    code, _, stderr = command("simulate", "--config", run_toml, *settings, "--out", tmp_path / "nobody")
    assert code == 2 and "no row of site 'north' names its unit" in stderr


def test_early_stopping_ends_a_phase_and_not_the_run(command: Command, run_toml: Path, tmp_path: Path) -> None:
    settings = ["--set", "phase.head.learning_rate=1e-9", "--set", "evaluation.patience=1"]
    command("simulate", "--config", run_toml, "--out", tmp_path / "out", *settings)
    lines = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    phases = [record["phase"] for record in records]
    assert phases.count("head") == 1 and records[2]["round"] == 4 and phases[2] == "lora"


def test_a_causal_language_model_is_tuned_and_answers(command: Command, tmp_path: Path, tiny_llama: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 30), ("validation", 6), ("test", 6)):
        rows = [
            {"q": f"what is {word} ?", "a": "it is not good", "where": "ab"[i % 2]}
            for i, word in enumerate(["pain", "fever", "rash"] * (count // 3))
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
[model]
name = "{tiny_llama}"
[task]
name = "causal-lm"
max_length = 32
[data]
path = "{data}"
site_column = "where"
columns = {{ prompt = "q", completion = "a" }}
[evaluation]
generate = 2
[[phase]]
name = "lora"
rounds = 2
steps = 2
batch_size = 5
learning_rate = 1.0
""",
        encoding="utf-8",
    )
    code, stdout, _ = command("simulate", "--config", config, "--out", tmp_path / "out", "--json")
    summary = json.loads(stdout)
    assert code == 0 and {"perplexity", "rouge_l", "loss"} <= set(summary["test"])
    code, stdout, _ = command(
        "predict", "--adapter", tmp_path / "out" / "adapter", "--input", data / "test.jsonl", "--column", "prompt=q"
    )
    assert code == 0 and len(stdout.splitlines()) == 6 and "completion" in json.loads(stdout.splitlines()[0])


BAD_INPUT = [
    (["--set", "privacy.epsilom=3"], "privacy.epsilom: unknown setting (did you mean 'epsilon'?)"),
    (["--set", "privacy.epsilon=0.0001"], "epsilon"),
    (["--set", "data.path=missing.csv"], "missing.csv"),
    (["--set", "data.columns.text=note"], "no such column"),
    (["--set", "data.site_column=clinic"], "clinic"),
    (["--set", 'task.labels=["urgent", "routine"]'], "review"),
    (["--set", 'lora.target_modules=["qkv"]'], "qkv"),
    (["--set", "lora.layers=9"], "only"),
    (["--set", "evaluation.metric=acuracy"], "acuracy"),
    (["--set", "evaluation.metric=loss", "--set", "evaluation.selection=one-standard-error"], "no standard error"),
    (["--set", "model.name=./nowhere"], "./nowhere"),
    (["--set", 'phase=[{name="x", rounds=1, batch_size=1000}]'], "does not fit site"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT)
def test_bad_input_is_one_message_exit_code_2_and_nothing_half_written(
    command: Command, run_toml: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, stdout, stderr = command("simulate", "--config", run_toml, "--out", tmp_path / "out", *arguments)
    assert code in (2, 3) and said in stderr and "Traceback" not in stderr
    assert stdout == "" and stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_run_is_refused_and_left_alone(
    command: Command, run_toml: Path, tmp_path: Path
) -> None:
    command("simulate", "--config", run_toml, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "summary.json").read_bytes()
    code, _, stderr = command("simulate", "--config", run_toml, "--out", tmp_path / "out")
    assert code == 2 and "already holds a run" in stderr
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_a_finished_run_resumes_to_itself_and_changed_settings_are_refused(
    command: Command, run_toml: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command("simulate", "--config", run_toml, "--out", out)
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    code, _, _ = command("simulate", "--resume", out)
    assert code == 0 and (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    settings = (out / "run.toml").read_text()
    (out / "run.toml").write_text(settings.replace("epsilon = 8.0", "epsilon = 7.0"))
    code, _, stderr = command("simulate", "--resume", out)
    assert code == 2 and "other settings" in stderr


def test_two_sites_that_would_share_a_name_are_refused(command: Command, run_toml: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        rows = "".join(f"mild cough {n},urgent,{'A/B' if n % 2 else 'A-B'}\n" for n in range(8))
        (data / f"{split}.csv").write_text(f"text,label,hospital\n{rows}", encoding="utf-8")
    code, _, stderr = command("simulate", "--config", run_toml, "--set", f"data.path={data}", "--out", tmp_path / "out")
    assert code == 2 and "A-B" in stderr and not (tmp_path / "out").exists()
