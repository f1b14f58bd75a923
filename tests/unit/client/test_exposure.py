"""What another user could read, judged by hand, and as the kernel judges it."""

from __future__ import annotations

import importlib.util
import itertools
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import client.exposure
from client.config import SiteConfig, SiteDataSection, SiteSection, TlsSection
from client.exposure import (
    ACCESS_LIST,
    WRITE,
    User,
    admit_relay,
    exposures,
    guarded,
    refuse_exposed,
    socket_faults,
    steering,
    user_of,
    welcome_users,
)
from common.errors import ConfigError

RELAY = User("relay", 61001, frozenset({61001, 61002}))
ROOT = User("root", 0, frozenset({0}))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users and become one")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody can enter and nobody else can list; those of pytest let nobody in."""
    with tempfile.TemporaryDirectory(prefix="exposure-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


LIBRARIES = client.exposure.LIBRARIES


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine take a second to look at; tests of libraries bring them back."""
    monkeypatch.setattr(client.exposure, "LIBRARIES", ())


def file_at(path: Path, mode: int = 0o600) -> Path:
    path.write_text("rows")
    path.chmod(mode)
    return path


def folder_at(path: Path, mode: int = 0o700) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


def found(user: User, path: Path) -> list[Path]:
    return [exposure.path for exposure in exposures(user, path)]


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("mode", "exposed"), [(0o600, False), (0o660, False), (0o604, True), (0o602, True), (0o601, False)]
)
def test_a_file_is_exposed_if_others_can_read_or_write_it(place: Path, mode: int, exposed: bool) -> None:
    file = file_at(place / "rows.csv", mode)
    assert found(RELAY, file) == [file] * exposed


def test_a_file_is_exposed_to_the_members_of_its_group_alone(place: Path) -> None:
    file = file_at(place / "rows.csv", 0o640)
    member = replace(RELAY, groups=frozenset({file.stat().st_gid}))
    assert found(member, file) == [file] and found(RELAY, file) == []


def test_a_member_of_the_group_has_the_groups_bits_and_not_those_of_others(place: Path) -> None:
    file = file_at(place / "rows.csv", 0o604)
    assert found(replace(RELAY, groups=frozenset({file.stat().st_gid})), file) == []


def test_a_user_whose_groups_nobody_knows_may_be_in_any(place: Path) -> None:
    unknown = replace(RELAY, groups=None)
    assert found(unknown, file_at(place / "group.csv", 0o640)) and found(unknown, file_at(place / "other.csv", 0o604))
    assert not found(unknown, file_at(place / "own.csv", 0o600))


@needs_root
def test_what_was_given_to_the_user_is_exposed_whatever_its_mode(place: Path) -> None:
    file = file_at(place / "rows.csv", 0o000)
    os.chown(file, RELAY.uid, 0)
    assert found(RELAY, file) == [file]


def test_root_reads_everything(place: Path) -> None:
    assert found(ROOT, file_at(place / "rows.csv", 0o000))


def test_a_folder_that_cannot_be_entered_protects_what_lies_below(place: Path) -> None:
    closed = folder_at(place / "closed", 0o700)
    inner = folder_at(closed / "inner", 0o777)
    assert found(RELAY, file_at(inner / "rows.csv", 0o666)) == []


def test_a_list_of_access_rights_counts_for_everybody_up_to_its_mask(place: Path) -> None:
    file = file_at(place / "rows.csv", 0o600)
    entries = [(0x01, 6, -1), (0x02, 4, RELAY.uid), (0x04, 0, -1), (0x10, 4, -1), (0x20, 0, -1)]  # see acl(5)
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(file, ACCESS_LIST, packed)
    except OSError:
        pytest.skip("this file system keeps no lists of access rights")
    assert file.stat().st_mode & 0o777 == 0o640  # the group's bits are the mask
    assert found(RELAY, file) == [file]


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("mode", [0o704, 0o702, 0o755])
def test_a_folder_is_exposed_if_others_can_list_or_write_it(place: Path, mode: int) -> None:
    folder = folder_at(place / "state", mode)
    file_at(folder / "ledger", 0o644)
    assert found(RELAY, folder) == [folder]


def test_in_a_folder_that_others_can_only_enter_each_open_file_is_named(place: Path) -> None:
    folder = folder_at(place / "state", 0o711)
    file_at(folder / "audit", 0o600)
    ledger = file_at(folder / "ledger", 0o644)
    secrets = folder_at(folder / "secrets", 0o711)
    seed = file_at(secrets / "seed", 0o604)
    assert found(RELAY, folder) == [ledger, seed]


def test_what_the_user_could_replace_is_exposed_although_it_cannot_read_it(place: Path) -> None:
    shared = folder_at(place / "shared", 0o773)
    assert found(RELAY, file_at(shared / "rows.csv")) == [shared]


def test_in_a_folder_like_tmp_nobody_replaces_what_is_anothers_but_may_take_a_free_name(place: Path) -> None:
    shared = folder_at(place / "shared", 0o1777)
    assert found(RELAY, file_at(shared / "rows.csv")) == []
    assert found(RELAY, shared / "not yet there") == [shared]


def test_links_are_followed_one_by_one(place: Path) -> None:
    closed, open_to_all = folder_at(place / "closed", 0o711), folder_at(place / "open", 0o773)
    rows = file_at(closed / "rows.csv")
    (open_to_all / "link").symlink_to(rows)  # which anybody can point elsewhere
    (closed / "link").symlink_to("../open/link")
    assert found(RELAY, closed / "link") == [open_to_all]
    (closed / "direct").symlink_to("rows.csv")
    assert found(RELAY, closed / "direct") == []


def test_a_circle_of_links_is_an_error_and_not_a_circle(place: Path) -> None:
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="cannot be looked at"):
        exposures(RELAY, place / "a")


def test_a_folder_that_links_to_itself_is_looked_at_once(place: Path) -> None:
    folder = folder_at(place / "state", 0o711)
    (folder / "again").symlink_to(folder)
    assert found(RELAY, folder) == []


@needs_root
def test_the_kernel_lets_the_user_read_exactly_what_is_exposed(place: Path) -> None:
    """A file in a folder, for every combination of owner, group and mode; ``cat`` as that user is the judge."""
    owners, groups = (0, RELAY.uid + 7), (0, 61002)
    files = []
    for folder_owner, folder_group, folder_mode in itertools.product(owners, groups, (0o700, 0o710, 0o701, 0o711)):
        folder = folder_at(place / f"{folder_owner}-{folder_group}-{folder_mode:o}")
        for owner, group, mode in itertools.product(owners, groups, (0o600, 0o640, 0o604, 0o644, 0o444)):
            file = file_at(folder / f"{owner}-{group}-{mode:o}", mode)
            os.chown(file, owner, group)
            files.append(file)
        os.chown(folder, folder_owner, folder_group)
        folder.chmod(folder_mode)
    readable = subprocess.run(
        ["sh", "-c", 'for file; do [ -r "$file" ] && echo "$file"; done; true', "sh", *map(str, files)],
        user=RELAY.uid,
        group=61001,
        extra_groups=[61002],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.split()
    assert [str(file) for file in files if found(RELAY, file)] == readable
    assert 0 < len(readable) < len(files) == 320


# ----------------------------------------------------------------------------------------------------------- socket


def test_a_socket_is_reached_through_a_folder_that_can_only_be_entered(place: Path) -> None:
    assert socket_faults(RELAY, place / "agent.sock") == []


@pytest.mark.parametrize(
    ("mode", "message"),
    [(0o700, "cannot enter"), (0o755, "can list"), (0o733, "can put something else"), (0o710, "cannot enter")],
)
def test_a_folder_of_the_socket_that_is_too_closed_or_too_open_is_told(place: Path, mode: int, message: str) -> None:
    folder = folder_at(place / "run", mode)
    (fault,) = socket_faults(RELAY, folder / "agent.sock")
    assert message in fault.can and fault.path == folder


def test_a_folder_above_the_socket_that_is_too_closed_or_too_open_is_told(place: Path) -> None:
    inner = folder_at(place / "run", 0o711)
    for mode, message in ((0o700, "cannot enter"), (0o733, "can put something else")):
        place.chmod(mode)
        (fault,) = socket_faults(RELAY, inner / "agent.sock")
        assert message in fault.can and fault.path == place
    place.chmod(0o755)
    assert socket_faults(RELAY, inner / "agent.sock") == []  # only its own folder must not be listed


def test_a_folder_that_the_agent_will_make_has_no_fault(place: Path) -> None:
    assert socket_faults(RELAY, place / "run" / "agent.sock") == []


# -------------------------------------------------------------------------------------------------------- refusals


def test_every_exposed_path_is_told_with_setting_user_and_remedy(place: Path) -> None:
    rows, state = file_at(place / "rows.csv", 0o644), folder_at(place / "state", 0o755)
    run = folder_at(place / "run", 0o700)
    fine = file_at(place / "key.pem")
    with pytest.raises(ConfigError) as caught:
        refuse_exposed(RELAY, {"data.a.path": rows, "tls.key": fine, "site.state": state}, run / "agent.sock")
    assert caught.value.problems == [
        f"data.a.path = '{rows}': the relay's user 'relay' can read or write '{rows}'; chmod go-rwx '{rows}'",
        f"site.state = '{state}': the relay's user 'relay' can list or write '{state}'; chmod go-rwx '{state}'",
        f"site.listen = 'unix:{run / 'agent.sock'}': the relay's user 'relay' cannot enter '{run}', and so not "
        f"connect; chmod o+x '{run}'",
    ]


def test_nothing_exposed_is_no_error(place: Path) -> None:
    refuse_exposed(RELAY, {"data.a.path": file_at(place / "rows.csv")}, place / "agent.sock")


# ------------------------------------------------------------------------------------------------------------ users


def test_a_user_is_known_by_name_and_number_with_all_its_groups() -> None:
    root = user_of("root")
    assert root == user_of("0") and root.uid == 0 and root.groups is not None and 0 in root.groups


def test_an_unknown_name_is_refused_and_an_unknown_number_may_be_in_any_group() -> None:
    with pytest.raises(ConfigError, match=r"site\.relay_user = 'nobody-such': there is no such user here; create it"):
        user_of("nobody-such")
    assert user_of("61999") == User("61999", 61999, None)


def test_the_number_that_stands_for_unknown_users_is_refused() -> None:
    with pytest.raises(ConfigError, match="every user it cannot name here"):
        user_of("65534")


# --------------------------------------------------------------------------------------------------- the whole site


def config_of(place: Path, **site: object) -> SiteConfig:
    """A site whose files nobody else can read, but for its socket."""
    file_at(place / "rows.csv")
    settings = {"name": "north", "listen": f"unix:{place}/agent.sock", "state": place / "state", **site}
    data = {"a": SiteDataSection(path=str(place / "rows.csv")), "b": SiteDataSection(path="hub/data")}
    return SiteConfig.model_construct(site=SiteSection(**settings), data=data, tls=None)


def test_the_relays_user_is_welcome_when_nothing_is_exposed(place: Path) -> None:
    config = config_of(place, relay_user="61001")
    assert admit_relay(config, file_at(place / "site.toml")) == {61001}
    assert (place / "state").stat().st_mode & 0o777 == 0o700  # made before anything is put there


def test_a_state_folder_that_cannot_be_made_is_told(place: Path) -> None:
    config = config_of(place, relay_user="61001", state=place / "rows.csv" / "state")
    with pytest.raises(ConfigError, match=r"site\.state = '.*': cannot be made \(Not a directory\); give another path"):
        admit_relay(config, file_at(place / "site.toml"))


def test_site_toml_itself_is_guarded(place: Path) -> None:
    config = config_of(place, relay_user="61001")
    with pytest.raises(ConfigError, match=r"^site\.toml = .*can read or write"):
        admit_relay(config, file_at(place / "site.toml", 0o644))


def test_data_of_the_hub_and_what_is_not_there_yet_are_not_guarded(place: Path) -> None:
    config = config_of(place, relay_user="61001", counter=place / "counter")
    paths = guarded(config, file_at(place / "site.toml"))
    assert set(paths) == {"site.toml", "data.a.path", "site.counter"}


def test_a_counter_that_the_user_could_make_first_is_exposed(place: Path) -> None:
    open_folder = folder_at(place / "open", 0o777)
    config = config_of(place, relay_user="61001", counter=open_folder / "counter")
    with pytest.raises(ConfigError, match=r"^site\.counter = .*can put something else in its place in"):
        admit_relay(config, file_at(place / "site.toml"))


def test_a_model_may_be_read_and_must_not_be_written(place: Path) -> None:
    model = folder_at(place / "model", 0o755)
    file_at(model / "config.json", 0o644)
    config = config_of(place, relay_user="61001").model_copy(update={"models": (str(model),)})
    source = file_at(place / "site.toml")
    assert admit_relay(config, source) == {61001}
    weights = file_at(model / "model.safetensors", 0o646)
    with pytest.raises(ConfigError) as caught:
        admit_relay(config, source)
    assert caught.value.problems == [
        f"models: {model} = '{model}': the relay's user '61001' can write '{weights}'; chmod go-w '{weights}'"
    ]


def test_the_installed_code_and_certificates_are_looked_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.exposure, "LIBRARIES", LIBRARIES)
    tls = TlsSection(**{name: file_at(place / name, 0o644) for name in ("certificate", "key", "authority")})
    paths = steering(config_of(place, listen="127.0.0.1:7000").model_copy(update={"tls": tls}))
    own = ("client", "common", "server", "simulations", "consilium.py")
    assert set(paths) == {
        *(f"installation: {name}" for name in (*own, "Python", "stdlib", "purelib", "platlib")),
        *("tls.certificate", "tls.authority"),
    }
    assert paths["installation: client"] == Path(client.exposure.__file__).parent
    looked_at = set(paths.values())
    for module in ("consilium", "server.app", "simulations.cli", "torch", "grpc", "pyarrow", "json", "sqlite3"):
        found = importlib.util.find_spec(module)
        assert found is not None and found.origin is not None
        assert looked_at & {Path(found.origin), *Path(found.origin).parents}, module


def installation(place: Path, monkeypatch: pytest.MonkeyPatch, libraries: str) -> Path:
    """A small one, with its libraries in this folder."""
    folder_at(place / "code", 0o755)
    for name in ("client", "common", "server", "simulations"):
        file_at(folder_at(place / "code" / name, 0o755) / "module.py", 0o644)
    file_at(place / "code" / "consilium.py", 0o644)
    at = place / libraries
    for folder in (at, at / "torch"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    file_at(at / "torch" / "nn.py", 0o644)
    monkeypatch.setattr(client.exposure, "__file__", str(place / "code" / "client" / "exposure.py"))
    monkeypatch.setattr(client.exposure, "LIBRARIES", LIBRARIES)
    monkeypatch.setattr(client.exposure.sysconfig, "get_path", lambda name: str(at))
    return at


@pytest.mark.parametrize("name", ["consilium.py", "server/module.py", "simulations/module.py", "client/module.py"])
def test_code_that_the_relay_could_write_stops_the_agent(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    installation(place, monkeypatch, "libraries")
    config, source = config_of(place, relay_user="61001"), file_at(place / "site.toml")
    assert admit_relay(config, source) == {61001}
    file = place / "code" / name
    file.chmod(0o666)
    with pytest.raises(ConfigError) as caught:
        admit_relay(config, source)
    entry = place / "code" / name.partition("/")[0]
    assert caught.value.problems == [
        f"installation: {entry.name} = '{entry}': the relay's user '61001' can write '{file}'; chmod go-w '{file}'"
    ]


@pytest.mark.parametrize("libraries", ["libraries", "code"])
def test_a_library_that_the_relay_could_write_is_told_once_wherever_the_code_is_installed(
    place: Path, monkeypatch: pytest.MonkeyPatch, libraries: str
) -> None:
    """Installed in the common way, the packages lie among the libraries; and all libraries lie in one folder."""
    at = installation(place, monkeypatch, libraries)
    module, own = at / "torch" / "nn.py", place / "code" / "client" / "module.py"
    module.chmod(0o646)
    own.chmod(0o646)
    looked_at = []
    stat = os.stat
    monkeypatch.setattr(client.exposure.os, "stat", lambda path, **how: looked_at.append(path) or stat(path, **how))
    with pytest.raises(ConfigError) as caught:
        refuse_exposed(RELAY, {}, writable=steering(config_of(place)))
    monkeypatch.undo()
    assert sorted(problem.partition(": the relay's")[0] for problem in caught.value.problems) == [
        f"installation: client = '{own.parent}'",
        f"installation: stdlib = '{at}'",
    ]
    assert looked_at.count(str(module)) == looked_at.count(str(own)) == 1


def test_a_link_among_the_libraries_is_followed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = installation(place, monkeypatch, "libraries")
    elsewhere = folder_at(place / "elsewhere", 0o757)
    file_at(elsewhere / "module.py", 0o644)
    (at / "linked").symlink_to(elsewhere / "module.py")
    assert [found.path for found in exposures(RELAY, at, WRITE)] == [elsewhere]


def test_looking_makes_nothing(place: Path) -> None:
    assert welcome_users(config_of(place, relay_user="61001"), file_at(place / "site.toml")) == {61001}
    assert not (place / "state").exists()


def test_without_a_relay_user_no_unix_socket_is_served(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.relay_user: is missing"):
        admit_relay(config_of(place), place / "site.toml")


def test_the_agents_own_user_is_refused_unless_the_relay_is_trusted_with_a_warning(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = str(os.geteuid())
    with pytest.raises(ConfigError, match="is the agent's own user"):
        admit_relay(config_of(place, relay_user=own), place / "site.toml")
    assert not caplog.records
    for user in (own, None):
        trusting = config_of(place, relay_user=user, trust_relay=True)
        assert admit_relay(trusting, place / "site.toml") == {os.geteuid()}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "CAN READ THE DATA" in caplog.text


def test_a_relay_behind_a_port_needs_no_user_here_but_is_checked_if_it_has_one(place: Path) -> None:
    elsewhere = config_of(place, listen="127.0.0.1:7000")
    assert admit_relay(elsewhere, place / "site.toml") is None
    here = config_of(place, listen="127.0.0.1:7000", relay_user="61001")
    (place / "rows.csv").chmod(0o644)
    with pytest.raises(ConfigError, match=r"data\.a\.path"):
        admit_relay(here, place / "site.toml")
