"""``site.toml``: every problem at once, and paths that mean the same wherever the agent is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.config import SiteConfig, read_site_config
from common.errors import ConfigError
from common.signing import SigningKey

KEY = SigningKey.fresh().public
POPULATION = "[populations.site]\npublic_size = 200\nlifetime_epsilon = 20.0\n"
POLICY = (
    '[policy]\nbase_models = []\ntasks = ["causal-lm"]\nlora_targets = ["attention"]\nmax_rank = 16\n'
    f'max_epsilon = 8.0\nmin_noise_multiplier = 0.3\ncoordinator_keys = ["{KEY}"]\n'
)
SMALLEST = f'[site]\nname = "north"\n[data.default]\npath = "notes.csv"\n{POPULATION}{POLICY}'
TLS = '[tls]\ncertificate = "site.pem"\nkey = "keys/site.key"\nauthority = "/etc/ca.pem"\n'


def read(folder: Path, text: str) -> SiteConfig:
    file = folder / "site.toml"
    file.write_text(text)
    return read_site_config(file)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    assert str(folder / "site.toml") in str(caught.value)
    return caught.value.problems


def test_a_small_file_is_enough_and_the_defaults_are_cautious(tmp_path: Path) -> None:
    config = read(tmp_path, SMALLEST)
    assert config.policy.approval == "manual"
    assert not config.policy.allow_no_privacy
    assert config.policy.secure_noise and config.policy.metrics == () and not config.site.trust_relay
    assert (config.policy.max_delta, config.populations["site"].lifetime_delta) == (1e-5, 1e-5)
    assert {entry.population for entry in config.data.values()} == {"site"}
    assert config.testing is None and config.tls is None
    assert config.site.listen.startswith("unix:")


def test_all_problems_are_told_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    text = (
        '[site]\nname = "no spaces please"\nlistn = "unix:a.sock"\n'
        '[data.default]\npath = "a.csv"\ncolums = {text = "note"}\n'
        "[populations.site]\npublic_size = 0\n[policy]\nmax_epsilon = -1.0\ncoordinator_keys = ['me']\n"
    )
    found = problems(tmp_path, text)
    assert len(found) >= 6
    joined = "\n".join(found)
    for expected in (
        "site.name",
        "site.listn: unknown setting (did you mean 'listen'?)",
        "data.default.colums: unknown setting (did you mean 'columns'?)",
        "populations.site.public_size",
        "populations.site.lifetime_epsilon: is required and missing",
        "policy.max_epsilon",
        "policy.base_models: is required and missing",
        "policy.min_noise_multiplier: is required and missing",
        "policy.coordinator_keys.0",
    ):
        assert expected in joined


def test_relative_paths_start_at_the_files_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.csv").write_text("text,label\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = read(tmp_path, f'models = ["base", "minilm"]\n{SMALLEST}{TLS}')
    home = tmp_path.resolve()
    assert config.data["default"].path == str(home / "notes.csv")
    assert config.models == (str(home / "base"), "minilm")
    assert (config.site.state, config.site.counter) == (home / "state", home / "consilium.counter")
    assert config.site.listen == f"unix:{home}/run/agent.sock"
    assert config.tls is not None
    assert (config.tls.certificate, config.tls.key) == (home / "site.pem", home / "keys" / "site.key")
    assert str(config.tls.authority) == "/etc/ca.pem"


def test_what_is_no_file_beside_it_is_left_as_a_hub_id(tmp_path: Path) -> None:
    config = read(tmp_path, SMALLEST.replace("notes.csv", "someone/notes"))
    assert config.data["default"].path == "someone/notes"


def test_a_network_address_needs_certificates(tmp_path: Path) -> None:
    text = SMALLEST.replace('name = "north"', 'name = "north"\nlisten = "0.0.0.0:9000"')
    (found,) = problems(tmp_path, text)
    assert "site.listen" in found and "[tls]" in found
    assert read(tmp_path, text + TLS).site.listen == "0.0.0.0:9000"


def test_a_socket_path_that_the_system_cannot_bind_is_told(tmp_path: Path) -> None:
    text = SMALLEST.replace('name = "north"', f'name = "north"\nlisten = "unix:{"a" * 120}"')
    (found,) = problems(tmp_path, text)
    assert "longer than 100 bytes" in found


def test_a_site_needs_data(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f'[site]\nname = "north"\n{POPULATION}{POLICY}[data]\n')
    assert "at least one [data.NAME]" in found


def test_a_site_needs_a_model(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"models = []\n{SMALLEST}")
    assert found.startswith("models = ")


def test_fixed_keys_must_be_asked_for_in_so_many_words(tmp_path: Path) -> None:
    assert "testing.noise" in "\n".join(problems(tmp_path, f"{SMALLEST}[testing]\nseed = 1\n"))
    config = read(tmp_path, f'{SMALLEST}[testing]\nseed = 1\nnoise = "fast"\n')
    assert config.testing is not None and config.testing.seed == 1


def test_the_true_size_is_published_only_by_consent(tmp_path: Path) -> None:
    assert read(tmp_path, SMALLEST.replace("200", '"exact"')).populations["site"].public_size == "exact"
    assert "populations.site.public_size" in "\n".join(problems(tmp_path, SMALLEST.replace("200", '"true"')))


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, f"schema_version = 2\n{SMALLEST}")
    assert "schema_version" in found and "newer" in found


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        read_site_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("field", ["base_models", "tasks", "lora_targets", "max_rank", "min_noise", "coordinator"])
def test_a_bound_that_is_left_out_is_told_and_never_assumed(tmp_path: Path, field: str) -> None:
    without = "".join(line for line in POLICY.splitlines(keepends=True) if not line.startswith(field))
    (found,) = problems(tmp_path, SMALLEST.replace(POLICY, without))
    assert found.startswith(f"policy.{field}") and found.endswith("is required and missing")


def test_data_belong_to_a_population_that_is_declared(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, SMALLEST.replace('"notes.csv"', '"notes.csv"\npopulation = "ward"'))
    assert "data.default.population: 'ward' is not declared; add [populations.ward]" in found


def test_several_populations_need_somebody_who_vouches_that_they_share_nobody(tmp_path: Path) -> None:
    second = SMALLEST + POPULATION.replace("site", "ward")
    (found,) = problems(tmp_path, second)
    assert "separation: with several populations" in found
    config = read(tmp_path, f'{second}[separation]\nstatement = "separate.json"\nkey = "{KEY}"\n')
    assert config.separation is not None and config.separation.statement == tmp_path.resolve() / "separate.json"
