"""From ``site.toml`` to a site: what is loaded once and kept, and what stops an agent from starting."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from site_files import site_tables, write_site
from small_sites import (
    LABELS,
    classifier,
    language_model,
    phase,
    plan_for,
    policy_for,
    random_state,
    request_for,
    shown,
)

import client.assemble
from client.announce import announce
from client.assemble import build_site, declared_size, encode_each
from client.audit_log import verify
from client.check import check_site
from client.config import WHOLE_SITE, SiteConfig, SiteDataSection, read_site_config
from client.separation import sign_separation
from common.adapted import AdaptedModel
from common.code import code_digest
from common.data.read import read_rows
from common.errors import ConfigError, ConsiliumError, DataError
from common.messages import Release
from common.sections import LoraSection
from common.signing import SigningKey
from common.tasks.sequence_classification import SequenceClassification

ROWS = [("mild cough", "routine"), ("chest pain", "urgent"), ("wound check", "review"), ("fever", "urgent")]


def site_toml(folder: Path, model: Path, **sections: Any) -> SiteConfig:
    with (folder / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *ROWS])
    device = {"device": "cpu", "physical_batch": 4, **sections.pop("device", {})}
    return read_site_config(write_site(folder, site_tables(model, device=device, **sections)))


def test_base_model_and_examples_are_loaded_once_for_all_rounds_and_runs(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, resident = build_site(site_toml(tmp_path, tiny_bert))
    reads = []
    read_rows = client.assemble.read_rows
    monkeypatch.setattr(client.assemble, "read_rows", lambda *given: reads.append(given) or read_rows(*given))
    plans = [plan_for(model, run_id="one"), plan_for(model, run_id="two"), plan_for(model, [phase("head")])]
    models = {id(resident.model(plan)) for plan in plans}
    examples = {id(resident.examples(plan, resident.model(plan))) for plan in plans}
    assert (len(models), len(examples), resident.loads, len(reads)) == (1, 1, 1, 1)
    assert resident.model(plans[0]).spec == model.spec
    site.ledger.close()


def test_a_plan_of_another_shape_replaces_the_resident_model(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path
) -> None:
    site, resident = build_site(site_toml(tmp_path, tiny_bert))
    resident.model(plan_for(model))
    wider = plan_for(model, lora=LoraSection(r=6, layers=1))
    assert {array[1][0] for array in resident.model(wider).spec.shapes if ".lora_A." in array[0]} == {6}
    assert resident.loads == 2 and len(resident._models) == 1
    site.ledger.close()


def test_the_sites_device_settings_reach_the_model(tiny_bert: Path, model: AdaptedModel, tmp_path: Path) -> None:
    config = site_toml(tmp_path, tiny_bert, device={"dtype": "bfloat16", "gradient_checkpointing": True})
    site, resident = build_site(config)
    placement = resident.model(plan_for(model)).base.placement
    assert (placement.device.type, str(placement.dtype), placement.gradient_checkpointing) == (
        "cpu",
        "torch.bfloat16",
        True,
    )
    assert site.resources.physical_batch == 4
    site.ledger.close()


def test_the_log_tells_of_each_start_and_of_bounds_that_were_changed(tiny_bert: Path, tmp_path: Path) -> None:
    for bound in (10.0, 10.0, 12.0):
        config = site_toml(tmp_path, tiny_bert, policy={**site_tables(tiny_bert)["policy"], "max_epsilon": bound})
        site, _ = build_site(config)
        announce(site, config)
        site.ledger.close()
    lines = [json.loads(line) for line in site.audit.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["agent started", "agent started", "policy changed", "agent started"]
    assert (lines[2]["setting"], lines[2]["before"], lines[2]["after"]) == ("policy.max_epsilon", "10.0", "12.0")
    assert lines[0]["terms"] == lines[1]["terms"] != lines[3]["terms"]
    assert verify(site.audit.path).intact and len(verify(site.audit.path).heads) == 1


def test_a_site_that_lost_its_key_does_not_make_a_new_one(tiny_bert: Path, tmp_path: Path) -> None:
    config = site_toml(tmp_path, tiny_bert)
    site, _ = build_site(config)
    site.ledger.close()
    (config.site.state / "site.key").unlink()
    with pytest.raises(ConfigError, match="is missing beside"):
        build_site(config)


def test_weights_that_nobody_reviewed_are_named_with_their_digest(tiny_bert: Path, tmp_path: Path) -> None:
    tables = site_tables(tiny_bert)
    digest = tables["policy"]["base_models"][0]
    config = site_toml(tmp_path, tiny_bert, policy={**tables["policy"], "base_models": ["0" * 64]})
    with pytest.raises(ConfigError, match=rf"policy\.base_models: does not list .* {digest}"):
        build_site(config)


def test_each_data_set_is_charged_to_its_own_population(tiny_bert: Path, model: AdaptedModel, tmp_path: Path) -> None:
    officer = SigningKey.fresh()
    populations = {
        name: {"public_size": size, "lifetime_epsilon": 9.0} for name, size in (("adults", 40), ("children", 20))
    }
    separation = {"statement": "separate.json", "key": officer.public}
    config = site_toml(tmp_path, tiny_bert, populations=populations, separation=separation)
    assert set(config.populations) == {"site", "adults", "children"}
    file = str(tmp_path / "train.csv")
    apart = {name: SiteDataSection(path=file, population=name) for name in ("adults", "children")}
    config = config.model_copy(update={"data": apart})
    with pytest.raises(ConfigError, match=r"separation\.statement"):
        build_site(config)
    sign_separation(config, officer)
    site, _ = build_site(config)
    sizes = {name: site.policy.population_of(plan_for(model, data=name)).public_size for name in populations}
    assert sizes == {"adults": 40, "children": 20}
    site.ledger.close()
    alone = {"site": config.populations["site"]}
    renamed = config.model_copy(update={"populations": alone, "data": {}, "separation": None})
    with pytest.raises(ConfigError, match=r"populations\.adults: is in the ledger and no longer declared"):
        build_site(renamed)


def test_fixed_keys_come_from_a_testing_section_alone(tiny_bert: Path, tmp_path: Path) -> None:
    site, _ = build_site(site_toml(tmp_path, tiny_bert))
    assert site.fixed_seed is None and site.claims_epsilon
    site.ledger.close()
    site, _ = build_site(site_toml(tmp_path, tiny_bert, testing={"noise": "fast", "seed": 3}))
    assert site.fixed_seed == 3 and not site.claims_epsilon
    site.ledger.close()


def test_an_allowed_model_is_known_by_the_digest_of_its_files(
    tiny_bert: Path, tiny_llama: Path, model: AdaptedModel, tmp_path: Path
) -> None:
    site, _ = build_site(site_toml(tmp_path, tiny_llama))
    assert site.policy.refusal(plan_for(model)) == policy_for(model).refusal(plan_for(model, model_digest="other"))
    site.ledger.close()
    site, _ = build_site(site_toml(tmp_path, tiny_bert))
    assert site.policy.refusal(plan_for(model)) is None
    site.ledger.close()


@pytest.mark.parametrize(
    "sections", [{"data": {"default": {"path": "none.csv"}}}, {"data": {"more": {"path": "none.parquet"}}}]
)
def test_data_that_cannot_be_read_stop_the_agent_from_starting(
    tiny_bert: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    site, resident = build_site(site_toml(tmp_path, tiny_bert, **sections))
    with pytest.raises(DataError, match=r"none\.(csv|parquet)"):
        resident.warm_up()
    site.ledger.close()


def test_a_model_that_is_not_there_stops_the_agent_from_starting(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="no such folder"):
        build_site(site_toml(tmp_path, tmp_path / "nowhere"))


def test_an_exact_size_is_the_number_of_rows_of_the_one_data_set(tiny_bert: Path, tmp_path: Path) -> None:
    exact = {"population": {"public_size": "exact"}}
    assert declared_size(site_toml(tmp_path, tiny_bert, **exact), WHOLE_SITE) == 4
    two = site_toml(tmp_path, tiny_bert, **exact, data={"more": {"path": "train.csv"}})
    with pytest.raises(ConfigError, match=r"needs exactly one \[data\.NAME\]"):
        declared_size(two, WHOLE_SITE)
    assert declared_size(site_toml(tmp_path, tiny_bert), WHOLE_SITE) == 40


def test_a_row_that_the_task_cannot_encode_leaves_the_others_as_they_are(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(tiny_bert)
    rows = {"text": ["mild cough", "pain", "fever"], "label": ["routine", "odd", "urgent"]}
    expected = encode_each(rows, model)
    assert expected[1] is None
    label_id = SequenceClassification.label_id

    def touchy(self: SequenceClassification, value: Any) -> int | None:
        if value == "odd":
            raise OverflowError("an odd label")
        return label_id(self, value)

    monkeypatch.setattr(SequenceClassification, "label_id", touchy)
    found = encode_each(rows, model)
    assert found[1] is None
    for index, label in ((0, "routine"), (2, "urgent")):
        item, same = found[index], expected[index]
        assert item is not None and same is not None
        assert item.ids.tolist() == same.ids.tolist() and int(item.target) == LABELS.index(label)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_text_that_no_tokenizer_takes_leaves_the_others_as_they_are(
    tiny_bert: Path, tiny_llama: Path, at: int
) -> None:
    for model, rows in (
        (language_model(tiny_llama), {"prompt": ["what ?", "why ?"], "completion": ["this .", "so ."]}),
        (classifier(tiny_bert), {"text": ["mild cough " * 50, "Chest pain"], "label": ["routine", "urgent"]}),
    ):
        others = encode_each(rows, model)
        odd = ("half a \ud800 character", "urgent")
        found = encode_each(
            {name: [*values[:at], one, *values[at:]] for (name, values), one in zip(rows.items(), odd, strict=True)},
            model,
        )
        assert found.pop(at) is None
        assert [item and (item.ids.tolist(), item.target.tolist()) for item in found] == [
            item and (item.ids.tolist(), item.target.tolist()) for item in others
        ]


def with_unchecked_texts(folder: Path, model: Path, *texts: bytes, **sections: Any) -> SiteConfig:
    """A Parquet file whose texts are bytes that nobody has checked, as other programs write it."""
    folder.mkdir()
    buffers = pa.array(texts, pa.binary()).buffers()
    column = pa.Array.from_buffers(pa.string(), len(texts), buffers)
    pq.write_table(pa.table({"text": column, "label": ["urgent"] * len(texts)}), folder / "train.parquet")
    return site_toml(folder, model, data={"default": {"path": "train.parquet"}}, **sections)


TEXTS = (b"mild cough", b"chest pain", b"fever")


@pytest.mark.parametrize("texts", [TEXTS, (*TEXTS, b"caf\xe9")], ids=["without", "with"])
def test_a_cell_that_cannot_be_read_fails_no_round_and_is_charged_like_any(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path, texts: tuple[bytes, ...]
) -> None:
    site, resident = build_site(with_unchecked_texts(tmp_path / "site", tiny_bert, *texts))
    resident.warm_up()
    plan = plan_for(model, code_digest=code_digest())
    assert site.describe(shown(plan, code_digest())).status == "ready"
    replies = [site.train(request_for(plan, random_state(model))) for _ in range(2)]
    assert [type(reply) for reply in replies] == [Release, Release]
    assert [charge[0] for charge in site.ledger.charges(plan.digest())] == [1]
    read = {"text": [*(text.decode() for text in TEXTS), None], "label": ["urgent"] * 4}
    assert resident.rows("default", plan.task) == {name: values[: len(texts)] for name, values in read.items()}
    site.ledger.close()


def test_the_sites_check_tells_of_a_cell_that_cannot_be_read(tiny_bert: Path, tmp_path: Path) -> None:
    report = check_site(
        with_unchecked_texts(tmp_path / "site", tiny_bert, *TEXTS, b"caf\xe9"), "sequence-classification", LABELS
    )
    assert report["data"]["default"]["first_faults"] == [{"row": 3, "field": "text", "reason": "is empty"}]


@pytest.mark.parametrize("raised", [DataError, KeyError, RecursionError, BaseException])
def test_whatever_is_wrong_with_the_data_a_fingerprint_is_given(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    site, resident = build_site(site_toml(tmp_path, tiny_bert))

    def unreadable(*_: Any) -> None:
        raise raised("a panic of a library in Rust is no Exception")

    monkeypatch.setattr(client.assemble, "read_rows", unreadable)
    assert resident.fingerprint(plan_for(model)) == ""
    monkeypatch.setattr(client.assemble, "read_rows", read_rows)
    assert len(resident.fingerprint(plan_for(model))) == 64
    site.ledger.close()


def test_who_stops_the_agent_stops_it_while_it_reads(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, resident = build_site(site_toml(tmp_path, tiny_bert))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.assemble, "read_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        resident.fingerprint(plan_for(model))
    site.ledger.close()


def test_the_cells_are_read_when_the_agent_starts_and_not_again(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_unchecked_texts(tmp_path / "site", tiny_bert, *TEXTS, b"caf\xe9")
    site, resident = build_site(config)
    resident.warm_up()
    assert "1 of 4 cells of column 'text' cannot be read as" in caplog.text
    (tmp_path / "site" / "train.parquet").unlink()
    plan = plan_for(model)
    assert resident.fingerprint(plan) and len(resident.examples(plan, resident.model(plan))) == 4
    site.ledger.close()


def test_data_that_no_allowed_task_can_learn_from_are_told_at_the_start(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = site_toml(tmp_path, tiny_bert)
    (tmp_path / "train.csv").write_text("note,label\nfever,urgent\n")
    for columns, told in (({}, True), ({"text": "note"}, False)):
        data = config.data["default"].model_copy(update={"columns": columns})
        site, resident = build_site(config.model_copy(update={"data": {"default": data}}))
        caplog.clear()
        resident.warm_up()
        assert ("data 'default' can be learnt from by no task of policy.tasks" in caplog.text) == told
        site.ledger.close()


@pytest.mark.parametrize("missing", [None, 1.5], ids=["missing", "no integer"])
def test_one_odd_label_does_not_change_how_a_file_of_integers_is_read(
    tiny_bert: Path, tmp_path: Path, missing: float | None
) -> None:
    model = classifier(tiny_bert)
    found = []
    for name, last in (("even", 2), ("odd", missing)):
        table = pa.table({"text": ["cough", "pain", "fever"], "label": [0, 1, last]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        rows = read_rows(str(tmp_path / f"{name}.parquet"), "train", ["text", "label"], {})
        found.append([item and int(item.target) for item in encode_each(rows, model)])
    assert found == [[0, 1, 2], [0, 1, None]]


def with_patients(folder: Path, model: Path) -> SiteConfig:
    """Four rows of two patients, and one row of nobody."""
    config = site_toml(
        folder,
        model,
        data={"default": {"path": "train.csv", "privacy_unit": "patient"}},
        population={"unit": "patient", "public_size": "exact"},
    )
    with (folder / "train.csv").open("w", newline="") as stream:
        patients = ("ann", "bob", " ann", "")
        rows = [(*row, patient) for row, patient in zip(ROWS, patients, strict=True)]
        csv.writer(stream).writerows([("text", "label", "patient"), *rows])
    return config


def test_a_site_counts_and_draws_patients_where_its_unit_is_the_patient(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path
) -> None:
    config = with_patients(tmp_path, tiny_bert)
    assert declared_size(config, WHOLE_SITE) == 2
    site, resident = build_site(config)
    plan = plan_for(model)
    examples = resident.examples(plan, resident.model(plan))
    assert examples.units is not None and examples.units.tolist() == [0, 1, 0, -1]
    assert (len(examples), examples.unit_count) == (4, 2)
    site.ledger.close()


def test_a_site_with_named_columns_and_a_unit_counts_its_units_when_it_starts(tiny_bert: Path, tmp_path: Path) -> None:
    config = with_patients(tmp_path, tiny_bert)
    named = config.data["default"].model_copy(update={"columns": {"text": "text", "label": "label"}})
    config = config.model_copy(update={"data": {"default": named}})
    assert declared_size(config, WHOLE_SITE) == 2
    site, resident = build_site(config)
    resident.warm_up()
    site.ledger.close()


def test_the_sites_check_tells_of_rows_that_name_no_unit(tiny_bert: Path, tmp_path: Path) -> None:
    report = check_site(with_patients(tmp_path, tiny_bert), "sequence-classification", LABELS)
    assert report["shared"]["populations"] == {"site": {"unit": "patient", "public_size": 2}}
    found = report["data"]["default"]
    assert (found["rows"], found["units"], found["faults"]) == (4, 2, 1)
    assert found["first_faults"] == [{"row": 3, "field": "privacy_unit", "reason": "names no unit"}]


def test_a_data_set_in_which_no_row_names_its_unit_stops_the_agent(tiny_bert: Path, tmp_path: Path) -> None:
    config = with_patients(tmp_path, tiny_bert)
    (tmp_path / "train.csv").write_text("text,label,patient\nfever,urgent,\n")
    with pytest.raises(DataError, match=r"no row of .* names its unit"):
        declared_size(config, WHOLE_SITE)


@pytest.mark.parametrize(("unit", "column"), [("patient", None), ("example", "patient")])
def test_a_unit_and_the_column_that_names_it_belong_together(
    tiny_bert: Path, tmp_path: Path, unit: str, column: str | None
) -> None:
    data = {"path": "train.csv"} if column is None else {"path": "train.csv", "privacy_unit": column}
    with pytest.raises(ConfigError, match=r"data\.default\.privacy_unit: .*populations\.site\.unit is"):
        site_toml(tmp_path, tiny_bert, data={"default": data}, population={"unit": unit})


def test_frozen_activations_outlive_the_agent_and_not_the_rows_they_are_of(
    tiny_bert: Path, model: AdaptedModel, tmp_path: Path
) -> None:
    config, plan = site_toml(tmp_path, tiny_bert), plan_for(model)
    kept = tmp_path / "state" / "cache" / "data-default" / f"{model.layer_cut.key()}.prefixes"
    written = []
    for _ in range(2):  # the agent restarts
        site, resident = build_site(config)
        resident.warm_up()
        resident_model = resident.model(plan)
        batches = resident.examples(plan, resident_model).batches(np.arange(4), 4, resident_model, model.layer_cut)
        assert len(list(batches)) == 1
        written.append(kept.stat().st_mtime_ns)
        site.ledger.close()
    assert written[0] == written[1]
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *ROWS[1:]])  # the first person has withdrawn
    site, resident = build_site(config)
    resident.warm_up()
    assert not kept.exists()
    site.ledger.close()


def test_with_a_cache_limit_of_zero_nothing_is_kept(tiny_bert: Path, model: AdaptedModel, tmp_path: Path) -> None:
    site, resident = build_site(site_toml(tmp_path, tiny_bert, device={"cache_limit": 0}))
    plan = plan_for(model)
    resident_model = resident.model(plan)
    list(resident.examples(plan, resident_model).batches(np.arange(4), 4, resident_model, model.layer_cut))
    assert list(resident.cache.rglob("*.prefixes")) == []
    site.ledger.close()
