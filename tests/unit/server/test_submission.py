"""The bundle and the way the configuration travels, each checked with Flower's own code as the second opinion."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.flower_config import parse_superlink_connection
from flwr.common.config import fuse_dicts, parse_config_args
from flwr.common.serde import user_config_from_proto, user_config_to_proto

import server.submission as submission
from common.errors import ConfigError, ConnectionFailed, OutputError, RunFailed
from server.submission import SuperLinkAddress, assemble_bundle

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # raised inside Flower

NASTY = "a'b\"c\\d \n\r\t\b\f\x00\x01\x1f\x7f\x85\u2028\ufeff é 漢 😀 #=[]{}, ${HOME} %s <b> \\u0041 key=\"v\" '''"


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small installation of the three packages, found by the code under test instead of the real one."""
    root = tmp_path / "installation"
    files = {
        "server/__init__.py": "",
        "server/app.py": "from flwr.serverapp import ServerApp\napp = ServerApp()\n",
        "server/aggregation/__init__.py": "",
        "server/aggregation/mean.py": "MEAN = 1\n",
        "server/__pycache__/app.cpython-311.pyc": "compiled",
        "server/notes.md": "not code",
        "common/__init__.py": "",
        "common/data/__init__.py": "",
        "common/data/read.py": "# in a folder that a careless ignore rule would drop\n",
        "client/__init__.py": "",
        "client/app.py": "from flwr.clientapp import ClientApp\napp = ClientApp()\n",
        "client/ledger.py": "stays at the site\n",
        "client/privacy/__init__.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    _install(monkeypatch, dict.fromkeys(("server", "common", "client"), root))
    return root


def _install(monkeypatch: pytest.MonkeyPatch, roots: dict[str, Path]) -> None:
    """Let each package be found under the given root."""
    monkeypatch.setattr(submission, "_installed_under", roots.__getitem__)


def _names(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}


def test_the_bundle_holds_server_common_and_the_relay_and_nothing_else(installation: Path, tmp_path: Path) -> None:
    assert _names(assemble_bundle(tmp_path)) == {
        "pyproject.toml",
        "server/__init__.py",
        "server/app.py",
        "server/aggregation/__init__.py",
        "server/aggregation/mean.py",
        "common/__init__.py",
        "common/data/__init__.py",
        "common/data/read.py",
        "client/__init__.py",
        "client/app.py",
    }


def test_flower_accepts_the_settings_and_packs_every_file_of_the_bundle(installation: Path, tmp_path: Path) -> None:
    bundle = assemble_bundle(tmp_path)
    settings, _ = load_and_validate(bundle / "pyproject.toml", check_module=False)
    packed = zipfile.ZipFile(BytesIO(build_fab_from_disk(bundle)))
    assert settings["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "server.app:app",
        "clientapp": "client.app:app",
    }
    assert set(packed.namelist()) == _names(bundle) | {".info/CONTENT"}
    for name in _names(bundle) - {"pyproject.toml"}:
        assert packed.read(name) == (installation / name).read_bytes()


def test_the_same_installation_gives_the_same_bytes(installation: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert build_fab_from_disk(assemble_bundle(first)) == build_fab_from_disk(assemble_bundle(second))


def test_a_bundle_is_not_written_over_another(installation: Path, tmp_path: Path) -> None:
    assemble_bundle(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        assemble_bundle(tmp_path)


def test_packages_of_two_installations_are_refused_by_name(
    installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = tmp_path / "stranger"
    shutil.copytree(installation / "common", stranger / "common")
    _install(monkeypatch, {"server": installation, "client": installation, "common": stranger})
    with pytest.raises(RunFailed, match=r"common in '.*stranger'.*environment"):
        assemble_bundle(tmp_path)


def test_a_missing_relay_is_named(installation: Path, tmp_path: Path) -> None:
    (installation / "client" / "app.py").unlink()
    with pytest.raises(RunFailed, match=r"client/app\.py.*reinstall"):
        assemble_bundle(tmp_path)


def test_code_that_exceeds_flowers_limit_is_refused_before_flower_is_asked(installation: Path, tmp_path: Path) -> None:
    (installation / "server" / "large.py").write_bytes(b"#" * submission.BUNDLE_LIMIT)
    with pytest.raises(RunFailed, match="10,485,760"):
        assemble_bundle(tmp_path)


@pytest.mark.parametrize(
    "text",
    [NASTY, "", "x" * 30_000, json.dumps({"labels": [NASTY] * 300}, ensure_ascii=False), json.dumps(NASTY)],
    ids=["nasty characters", "empty", "30 kB", "large and nasty", "ASCII JSON of nasty characters"],
)
def test_the_configuration_reaches_the_run_unchanged(installation: Path, tmp_path: Path, text: str) -> None:
    """The path it takes: file, command line parser, protobuf, merge with the bundle's defaults."""
    file = tmp_path / "run-config.toml"
    file.write_text(submission.run_config_toml(text), encoding="utf-8", newline="\n")
    sent = user_config_from_proto(user_config_to_proto(parse_config_args([str(file)])))
    defaults = tomllib.loads((assemble_bundle(tmp_path) / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    assert fuse_dicts(defaults, sent) == {"config": text}


def test_a_string_of_every_low_character_survives_toml() -> None:
    text = "".join(map(chr, range(0x300)))
    assert tomllib.loads(f"text = {submission.toml_string(text)}") == {"text": text}


def test_flower_reads_the_connection_as_it_was_given(tmp_path: Path) -> None:
    certificates = tmp_path / 'a "quoted" folder' / "ca.pem"
    certificates.parent.mkdir()
    certificates.write_text("certificate")
    written = tomllib.loads(submission.connection_toml(SuperLinkAddress("link.example:8000", certificates)))[
        "superlink"
    ]
    read = parse_superlink_connection(written[written["default"]], "consilium")
    assert (read.address, read.root_certificates, read.insecure) == ("link.example:8000", str(certificates), False)
    plain = tomllib.loads(submission.connection_toml(SuperLinkAddress("[::1]:8000", insecure=True)))["superlink"]
    read = parse_superlink_connection(plain[plain["default"]], "consilium")
    assert (read.address, read.root_certificates, read.insecure) == ("[::1]:8000", None, True)


@pytest.mark.parametrize("address", ["link.example", "https://link.example:8000", "link.example:", ":8000", "a b:1"])
def test_an_address_that_is_not_host_and_port_is_refused_by_value(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        SuperLinkAddress(address)
    assert f"'{address}'" in str(raised.value) and "HOST:PORT" in str(raised.value)


def test_all_problems_of_an_address_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        SuperLinkAddress("nowhere", tmp_path / "missing.pem", insecure=True)
    assert len(raised.value.problems) == 3


def test_host_and_port_of_an_ipv6_address_lose_the_brackets() -> None:
    assert SuperLinkAddress("[::1]:9000").host_and_port == ("::1", 9000)


def test_commands_get_a_home_of_their_own_and_report_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", "/somewhere/else")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    environment = submission.command_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert "FORCE_COLOR" not in environment


class _Command:
    """Stands in for ``subprocess.run``: answers, and remembers what was asked."""

    def __init__(self, returncode: int, stdout: str, stderr: str = "") -> None:
        self.result = subprocess.CompletedProcess([], returncode, stdout, stderr)
        self.arguments: list[str] = []
        self.run_config = ""

    def __call__(self, arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.arguments = arguments
        if "--run-config" in arguments:
            self.run_config = Path(arguments[arguments.index("--run-config") + 1]).read_text(encoding="utf-8")
        return self.result


def test_a_submitted_run_is_known_by_flowers_id(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = _Command(0, '{"success": true, "run-id": "14319675979018060946"}')
    monkeypatch.setattr(subprocess, "run", command)
    assert submission.submit(SuperLinkAddress("127.0.0.1:1", insecure=True), NASTY) == 14319675979018060946
    assert tomllib.loads(command.run_config) == {"config": NASTY}
    assert Path(command.arguments[0]).name == "flwr" and command.arguments[1] == "run"


@pytest.mark.parametrize(
    ("status", "details", "expected"),
    [
        ("running", "N/A", "running"),
        ("finished:completed", "", "finished:completed"),
        (
            "finished:failed",
            "No heartbeat received from the task",
            "finished:failed: No heartbeat received from the task",
        ),
    ],
)
def test_a_status_carries_its_reason_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, status: str, details: str, expected: str
) -> None:
    answer = json.dumps({"success": True, "runs": [{"status": status, "status-details": details}]})
    monkeypatch.setattr(subprocess, "run", _Command(0, answer))
    assert submission.run_status(SuperLinkAddress("127.0.0.1:1", insecure=True), 5) == expected


def test_a_refusal_is_quoted_without_flowers_progress_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower exits with 0 after an error in JSON form."""
    message = "Using SuperLink: consilium (127.0.0.1:1)\n Stopping run ID 5...\n\n[code: 18] Run is already finished."
    answer = json.dumps({"success": False, "error-message": message})
    monkeypatch.setattr(subprocess, "run", _Command(0, answer))
    monkeypatch.setattr(submission, "_check_connection", lambda superlink: None)
    with pytest.raises(RunFailed, match=r"127\.0\.0\.1:1 refused 'flwr stop': \[code: 18\] Run is already finished\.$"):
        submission.stop(SuperLinkAddress("127.0.0.1:1", insecure=True), 5)


def test_a_usage_error_is_quoted_without_the_box_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    box = "╭─ Error ──────╮\n│ No such      │\n│ option       │\n╰──────────────╯\n"
    monkeypatch.setattr(subprocess, "run", _Command(2, "", box))
    monkeypatch.setattr(submission, "_check_connection", lambda superlink: None)
    with pytest.raises(RunFailed, match=r"'flwr list': No such option$"):
        submission.run_status(SuperLinkAddress("127.0.0.1:1", insecure=True), 5)


def test_a_port_that_nothing_listens_on_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        # Bound but not listening: a connection is refused, and no one else can take the port meanwhile.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(subprocess, "run", _Command(0, '{"success": false, "error-message": "?"}'))
        with pytest.raises(ConnectionFailed, match=rf"{address} cannot be reached .*flower-superlink is running"):
            submission.run_status(SuperLinkAddress(address, insecure=True), 5)


def test_the_installed_code_fits_flowers_limit(tmp_path: Path) -> None:
    if not (Path(submission.__file__).parents[1] / "client" / "app.py").is_file():
        pytest.skip("client/app.py does not exist in this checkout")
    assert len(build_fab_from_disk(assemble_bundle(tmp_path))) < submission.BUNDLE_LIMIT
