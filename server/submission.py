"""Hand a run to a real Flower deployment: bundle the installed code, submit it, ask after it, stop it.

Flower ships code as a bundle (FAB) and runs it at the SuperLink (``server.app``) and at every site
(``client.app``, the relay). The bundle is assembled from the files installed beside this one, so that what runs is
what is installed here, and nothing else of the client side travels: the agent, the trainer and the ledger stay out.

Everything goes through Flower's command line rather than its Python modules: the command line is the interface Flower
documents for users, and each call can have a Flower home of its own. That home holds one connection and is thrown away,
so a user's ``~/.flwr`` is neither read nor changed. No call phones home.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, OutputError, RunFailed
from server.reachability import check_connection

CONFIG_KEY = "config"
"""The one key of Flower's run configuration that is used: the whole resolved configuration as a JSON string."""

BUNDLE_LIMIT = 10 * 1024 * 1024
"""Flower's limit on a bundle, in bytes."""

PRIVATE_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""What keeps Flower and the libraries under it from reporting to their makers; for every process of a deployment."""

_CONNECTION = "consilium"
_BUNDLE = "consilium"
_WHOLE_PACKAGES = ("server", "common")
_RELAY_FILES = ("__init__.py", "app.py")
_COMMAND_TIMEOUT = 180.0
_BOX = re.compile(r"[\u2500-\u257f]+( Error )?")
_TERMINAL_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class SuperLinkAddress:
    """Where a SuperLink listens and how to recognise it.

    Attributes:
        address: ``HOST:PORT`` of its HTTP interface (Control, Fleet and Runtime share one port).
        root_certificates: PEM file of the authority that signed its certificate; None means the system's authorities.
        insecure: talk plain HTTP. For a SuperLink on this machine only: the Control interface has no authentication.

    Raises:
        ConfigError: the address has no port, the file is missing, or ``insecure`` contradicts ``root_certificates``.
    """

    address: str
    root_certificates: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Report every problem of the three settings at once."""
        problems = []
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):\d{1,5}", self.address):
            problems.append(f"superlink address '{self.address}': give HOST:PORT, without a scheme such as https://")
        if self.insecure and self.root_certificates is not None:
            problems.append("insecure = true contradicts root_certificates: drop one of the two")
        if self.root_certificates is not None and not self.root_certificates.is_file():
            problems.append(
                f"root_certificates '{self.root_certificates}': no such file; "
                "ask the SuperLink's operator for its CA certificate (PEM)"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The host without brackets, and the port."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def assemble_bundle(folder: Path) -> Path:
    """Write the Flower app that is submitted, and return its folder.

    It holds all of ``server`` and ``common``, the relay ``client/app.py``, and a generated ``pyproject.toml``; of the
    packages only ``.py`` files. The same installation always gives the same bytes.

    Args:
        folder: an existing folder; the bundle becomes its sub-folder ``consilium``.

    Raises:
        OutputError: that sub-folder exists already.
        RunFailed: the installed packages are incomplete or come from different installations.
    """
    bundle = folder / _BUNDLE
    try:
        bundle.mkdir()
    except FileExistsError:
        raise OutputError(f"bundle folder '{bundle}' exists already: choose an empty folder") from None
    size = 0
    for name, source in sorted(_bundled_files()):
        target = bundle / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size += target.write_bytes(source.read_bytes())
    (bundle / "pyproject.toml").write_text(_bundle_settings(), encoding="utf-8", newline="\n")
    if size >= BUNDLE_LIMIT:
        raise RunFailed(
            f"the installed code is {size:,} bytes and Flower accepts bundles below {BUNDLE_LIMIT:,}: "
            f"remove files that are not part of Consilium from '{_package_root()}'"
        )
    return bundle


def submit(superlink: SuperLinkAddress, config_json: str) -> int:
    """Submit a run and return Flower's run id. It does not wait for the run to start.

    Args:
        superlink: where to submit.
        config_json: the resolved configuration; ``server.app`` finds the same string in
            ``context.run_config["config"]``.

    Raises:
        ConnectionFailed: the SuperLink cannot be reached or its certificate is not trusted.
        RunFailed: Flower refused the run.
    """
    with tempfile.TemporaryDirectory(prefix="consilium-submit-") as scratch:
        bundle = assemble_bundle(Path(scratch))
        settings = Path(scratch) / "run-config.toml"
        # As a file: on the command line Flower splits values at blanks and allows only one kind of quote.
        settings.write_text(run_config_toml(config_json), encoding="utf-8", newline="\n")
        answer = control(superlink, "run", str(bundle), _CONNECTION, "--run-config", str(settings))
    return int(answer["run-id"])


def run_status(superlink: SuperLinkAddress, run_id: int) -> str:
    """Where a run stands.

    Returns:
        ``pending``, ``starting``, ``running``, ``finished:completed``, ``finished:stopped: REASON`` or
        ``finished:failed: REASON``.

    Raises:
        ConnectionFailed: the SuperLink cannot be reached or its certificate is not trusted.
        RunFailed: the SuperLink does not know the run.
    """
    run = control(superlink, "list", _CONNECTION, "--run-id", str(run_id))["runs"][0]
    status, details = str(run["status"]), str(run["status-details"]).strip()
    return status if details in {"", "N/A"} else f"{status}: {details}"


def stop(superlink: SuperLinkAddress, run_id: int) -> None:
    """Stop a run that has not finished.

    Raises:
        ConnectionFailed: the SuperLink cannot be reached or its certificate is not trusted.
        RunFailed: the SuperLink does not know the run, or it has finished already.
    """
    control(superlink, "stop", str(run_id), _CONNECTION)


def follow_log(superlink: SuperLinkAddress, run_id: int) -> Iterator[str]:
    """Yield what the ServerApp writes to stdout and stderr, line by line, until the run has finished.

    This is also the cheap way to wait for a run: one idle process, where each ``run_status`` costs a second of a core.
    Closing the iterator ends that process and leaves the run alone.

    Raises:
        ConnectionFailed: the SuperLink cannot be reached (any more) or its certificate is not trusted.
        RunFailed: the SuperLink does not know the run.
    """
    with _flower_command(superlink, "log", str(run_id), _CONNECTION, "--stream") as (command, environment, home):
        process = subprocess.Popen(
            command,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        recent: deque[str] = deque(maxlen=5)
        with process:
            try:
                for line in process.stdout or ():
                    recent.append(_TERMINAL_COLOUR.sub("", line.rstrip("\n")))
                    yield recent[-1]
            finally:
                process.terminate()
    if process.returncode != 0:
        _check_connection(superlink)
        raise RunFailed(f"the SuperLink at {superlink.address} sent no log of run {run_id}: {_plain(*recent)}")


def control(superlink: SuperLinkAddress, *arguments: str) -> dict[str, Any]:
    """Run one command of Flower's command line against a SuperLink and return its JSON answer.

    Args:
        superlink: the SuperLink; the command knows it as the connection ``consilium``.
        arguments: the command without ``--format json``, for example ``"list", "consilium"``.

    Raises:
        ConnectionFailed: the SuperLink cannot be reached or its certificate is not trusted.
        RunFailed: the command failed for another reason, which the message quotes.
    """
    with _flower_command(superlink, *arguments, "--format", "json") as (command, environment, home):
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd=home,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_COMMAND_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            _check_connection(superlink)
            raise RunFailed(
                f"'flwr {arguments[0]}' got no answer from the SuperLink at {superlink.address} "
                f"within {_COMMAND_TIMEOUT:.0f} s: look at the SuperLink's log"
            ) from None
    answer = _read_answer(done.stdout)
    if done.returncode == 0 and answer.get("success") is True:
        return answer
    _check_connection(superlink)
    # Flower puts its progress messages before the error, with a blank line between.
    reason = str(answer.get("error-message", "")).strip().rpartition("\n\n")[2]
    reason = reason or _plain(done.stderr or done.stdout) or "no reason given"
    raise RunFailed(f"the SuperLink at {superlink.address} refused 'flwr {arguments[0]}': {reason}")


def flower_program(name: str) -> Path:
    """The path of one of Flower's programs, from the environment this interpreter belongs to.

    Raises:
        RunFailed: the environment has no such program.
    """
    program = Path(sys.executable).parent / name
    if not program.is_file():
        raise RunFailed(f"'{program}' does not exist: install flwr into the environment that Consilium runs from")
    return program


def command_environment(flower_home: Path) -> dict[str, str]:
    """The environment for one of Flower's programs: its own home, its own programs first, nothing reported."""
    environment = {name: value for name, value in os.environ.items() if name not in {"FORCE_COLOR", "CLICOLOR_FORCE"}}
    programs = str(Path(sys.executable).parent)
    return (
        environment
        | PRIVATE_ENVIRONMENT
        | {
            "FLWR_HOME": str(flower_home),
            # Flower starts its helper programs by bare name.
            "PATH": os.pathsep.join(filter(None, (programs, environment.get("PATH", "")))),
            "NO_COLOR": "1",
            "TERM": "dumb",
            "PYTHONUTF8": "1",
        }
    )


def connection_toml(superlink: SuperLinkAddress) -> str:
    """Flower's ``config.toml`` with this SuperLink as its only connection, named ``consilium``."""
    lines = [
        "[superlink]",
        f"default = {toml_string(_CONNECTION)}",
        f"[superlink.{_CONNECTION}]",
        f"address = {toml_string(superlink.address)}",
        f"insecure = {'true' if superlink.insecure else 'false'}",
    ]
    if superlink.root_certificates is not None:
        lines.append(f"root-certificates = {toml_string(str(superlink.root_certificates.resolve()))}")
    return "\n".join(lines) + "\n"


def run_config_toml(config_json: str) -> str:
    """The file for ``flwr run --run-config`` that carries the configuration unchanged."""
    return f"{CONFIG_KEY} = {toml_string(config_json)}\n"


def toml_string(text: str) -> str:
    r"""``text`` as a TOML basic string.

    JSON's escapes are TOML's as well, except that TOML also forbids a bare U+007F (TOML 1.0, "String") and knows no
    surrogate escapes; so other characters stay as they are.
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


@contextmanager
def _flower_command(superlink: SuperLinkAddress, *arguments: str) -> Iterator[tuple[list[str], dict[str, str], Path]]:
    """A command line, its environment, and its working folder, which is also Flower's home and lives as long as this.

    The working folder is not the user's: Flower rewrites a ``pyproject.toml`` that it finds there.
    """
    with tempfile.TemporaryDirectory(prefix="consilium-flower-") as scratch:
        home = Path(scratch)
        (home / "config.toml").write_text(connection_toml(superlink), encoding="utf-8", newline="\n")
        yield [str(flower_program("flwr")), *arguments], command_environment(home), home


def _bundled_files() -> Iterator[tuple[str, Path]]:
    """Each file of the bundle as its POSIX name in the bundle and its place on disk."""
    root = _package_root()
    for package in _WHOLE_PACKAGES:
        for source in (root / package).rglob("*.py"):
            yield source.relative_to(root).as_posix(), source
    for name in _RELAY_FILES:
        source = root / "client" / name
        if not source.is_file():
            raise RunFailed(f"the installation lacks '{source}': reinstall Consilium")
        yield f"client/{name}", source


def _package_root() -> Path:
    """The folder that holds the packages, which must be one and the same for all of them.

    The names are generic; another distribution's ``client`` or ``common`` found first would otherwise be shipped.
    """
    roots = {package: _installed_under(package) for package in (*_WHOLE_PACKAGES, "client")}
    if len(set(roots.values())) > 1:
        found = ", ".join(f"{package} in '{root}'" for package, root in roots.items())
        raise RunFailed(f"packages of different installations are mixed ({found}): give Consilium its own environment")
    return roots["server"]


def _installed_under(package: str) -> Path:
    """The folder in which Python finds a package; it is not imported for that."""
    specification = importlib.util.find_spec(package)
    if specification is None or specification.origin is None:
        raise RunFailed(f"the package '{package}' is not installed: reinstall Consilium")
    return Path(specification.origin).resolve().parent.parent


def _bundle_settings() -> str:
    try:
        version = importlib.metadata.version("consilium")
    except importlib.metadata.PackageNotFoundError:
        version = "0.0.0"
    # No dependencies: a SuperLink that installs a run's dependencies would otherwise fetch torch for every run.
    return f"""\
[project]
name = {toml_string(_BUNDLE)}
version = {toml_string(version)}
description = "Differentially private federated fine-tuning with LoRA adapters"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "consilium"
fab-include = ["server/**/*.py", "common/**/*.py", "client/__init__.py", "client/app.py"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{CONFIG_KEY} = ""
"""


def _read_answer(output: str) -> dict[str, Any]:
    try:
        answer = json.loads(output)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _check_connection(superlink: SuperLinkAddress) -> None:
    """Raise what is wrong with the connection, for which Flower has one message whatever it is."""
    host, port = superlink.host_and_port
    check_connection(host, port, superlink.root_certificates, superlink.insecure)


def _plain(*lines: str) -> str:
    """Flower's error without the box that its command line draws around it."""
    return " ".join(_BOX.sub(" ", "\n".join(lines)).split())
