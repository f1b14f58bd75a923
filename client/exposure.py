"""Could the relay's user read what the agent guards? If it could, shipped code could, and the agent does not start.

What counts as exposed, judged by owner, group and mode of everything that is passed on the way from ``/``, links
followed:

- a file that the user can read or write, a folder that it can list or write, and any such in a folder it can enter;
- anything below a folder in which the user could put something else in its place;
- anything that belongs to the user, who can change the mode.

What decides what the agent does, and is no secret (base models in folders of this machine, certificates, the installed
code with Python and the libraries), may be read, and must not be written.

The folder of the agent's socket is judged otherwise, for the relay must connect: the user must be able to enter it and
all folders above it, and must not be able to list it (it would learn the names of what lies beside the socket), nor to
write there or above (it could put a socket of its own in its place). The socket itself may be open to everybody: the
doorman asks the kernel who connects.

The agent cannot see what a user may do beyond these modes: capabilities, sudo, groups such as docker or disk, mandatory
access control, another view of the files inside a container, and copies or backups kept elsewhere.
"""

from __future__ import annotations

import errno
import logging
import os
import pwd
import stat
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from client.config import SiteConfig
from common.errors import ConfigError

log = logging.getLogger(__name__)

READ, WRITE, ENTER = 4, 2, 1
ACCESS_LIST = "system.posix_acl_access"
MOST_LINKS = 40
"""As in path_resolution(7)."""
ENOUGH = 3
"""Files of a model or an installation that are named; the remedy for one is that for all."""
TRUSTING = (
    "site.trust_relay = true: the relay may run under the agent's own user, and then CODE THAT THE COORDINATOR SHIPS "
    "CAN READ THE DATA; for trials only"
)
OWN = ("client", "common", "server", "simulations", "consilium.py")
"""What is installed beside this package, and run by the same command."""
LIBRARIES = ("stdlib", "purelib", "platlib")
"""Python's own library, and the folders that others are installed in, as sysconfig calls them."""
NOTHING: Mapping[str, Path] = MappingProxyType({})


@dataclass(frozen=True)
class User:
    """A user of this machine.

    Attributes:
        groups: ids of all its groups; ``None`` where nobody knows them, and any group may be one of them.
    """

    name: str
    uid: int
    groups: frozenset[int] | None


@dataclass(frozen=True)
class Exposure:
    """What a user can do with a path, and how to end that."""

    path: Path
    can: str
    remedy: str


def admit_relay(config: SiteConfig, source: Path) -> frozenset[int] | None:
    """The users that may connect to the agent, once it is sure that they can reach nothing else of the site.

    The state folder is made (0700) if it is not there, for what is made later is not looked at.

    Args:
        source: ``site.toml``.

    Raises:
        ConfigError: the relay's user is missing or unknown, or could reach what the agent guards.
    """
    state = config.site.state
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"site.state = '{state}': cannot be made ({error.strerror}); give another path") from None
    welcome = welcome_users(config, source)
    if welcome == frozenset({os.geteuid()}):
        log.warning("%s", TRUSTING)
    return welcome


def welcome_users(config: SiteConfig, source: Path) -> frozenset[int] | None:
    """The users that may connect to the agent; makes nothing.

    ``None`` for a port without ``site.relay_user``: the relay is elsewhere, and its certificate tells who it is.

    Raises:
        ConfigError: as :func:`admit_relay`.
    """
    unix = config.site.listen.startswith("unix:")
    if config.site.relay_user is None and not unix:
        return None
    user = _relay_of(config)
    if user.uid != os.geteuid():
        socket = Path(config.site.listen.removeprefix("unix:")) if unix else None
        refuse_exposed(user, guarded(config, source), socket, steering(config))
    return frozenset({user.uid})


def user_of(name: str) -> User:
    """The user of a name or number.

    Raises:
        ConfigError: there is no such user, or its number stands for unknown users.
    """
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        user = User(entry.pw_name, entry.pw_uid, frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid)))
    except KeyError:
        if not name.isdecimal():
            raise ConfigError(
                f"site.relay_user = '{name}': there is no such user here; create it (useradd --system), or give its "
                "number if only another container knows its name"
            ) from None
        user = User(name, int(name), None)
    if user.uid == _stand_in():
        raise ConfigError(
            f"site.relay_user = '{name}': the kernel shows every user it cannot name here under this number; run "
            "SuperNode under a user of its own"
        )
    return user


def guarded(config: SiteConfig, source: Path) -> dict[str, Path]:
    """Setting → path of what the relay must not reach: ``site.toml`` itself, and all that it names and that is there.

    The counter need not be there yet: who could make it first would own it. Data without a path here come from the hub.
    """
    paths = {"site.toml": source, "site.state": config.site.state}
    paths |= {f"data.{name}.path": Path(data.path).expanduser() for name, data in config.data.items()}
    if config.tls is not None:
        paths["tls.key"] = config.tls.key
    return {setting: path for setting, path in paths.items() if path.exists()} | {"site.counter": config.site.counter}


def steering(config: SiteConfig) -> dict[str, Path]:
    """Setting → path of what the relay may read and must not write, as far as it is there.

    A base model is loaded long after its digest was compared. Models of the hub lie in a cache that is not looked at,
    and neither are libraries that are installed in place, elsewhere than all others.
    """
    paths = {f"models: {name}": Path(name).expanduser() for name in config.models}
    paths |= {f"installation: {name}": Path(__file__).parents[1] / name for name in OWN}
    paths |= {f"installation: {name}": Path(sysconfig.get_path(name)) for name in LIBRARIES}
    paths["installation: Python"] = Path(sys.executable)
    if config.tls is not None:
        paths |= {"tls.certificate": config.tls.certificate, "tls.authority": config.tls.authority}
    return {setting: path for setting, path in paths.items() if path.exists()}


def refuse_exposed(
    user: User, paths: Mapping[str, Path], socket: Path | None = None, writable: Mapping[str, Path] = NOTHING
) -> None:
    """Returns if the user can reach none of the paths, and can connect to the socket.

    Args:
        paths: setting → path.
        writable: the same of what it must not write, and may read.

    Raises:
        ConfigError: lists every exposed path with its setting and the remedy; of a whole installation a few.
    """
    looked_at = [(*entry, exposures(user, entry[1])) for entry in paths.items()]
    seen: set[str] = set()  # one folder of an installation may lie in another
    looked_at += [(*entry, exposures(user, entry[1], WRITE, seen)[:ENOUGH]) for entry in writable.items()]
    problems = [
        f"{setting} = '{path}': the relay's user '{user.name}' {found.can}; {found.remedy}"
        for setting, path, exposed in looked_at
        for found in exposed
    ]
    if socket is not None:
        problems += [
            f"site.listen = 'unix:{socket}': the relay's user '{user.name}' {found.can}; {found.remedy}"
            for found in socket_faults(user, socket)
        ]
    if problems:
        raise ConfigError(problems)


def exposures(user: User, path: Path, forbidden: int = READ | WRITE, seen: set[str] | None = None) -> list[Exposure]:
    """What the user could read, write or replace of a file, or of a folder and all that lies in it.

    Args:
        forbidden: mode bits that it must not have, WRITE among them.
        seen: what was looked at before, and is not again; what is looked at now is added.

    Raises:
        ConfigError: the agent itself cannot look.
    """
    try:
        return list(_exposures(user, path, set() if seen is None else seen, forbidden))
    except OSError as error:
        raise ConfigError(
            f"'{path}': cannot be looked at ({error.strerror}), so nobody knows who can read it; give it to the "
            "agent's user"
        ) from None


def socket_faults(user: User, socket: Path) -> list[Exposure]:
    """Why the user could not connect to a socket, or could do more than that. A folder to be made yet has none."""
    passed, folder = _way(socket.parent)
    for at, name in [*passed, (folder, socket.name)]:
        if not at.exists():
            return []
        may = _may(user, at)
        if not may & ENTER:
            return [Exposure(at, f"cannot enter '{at}', and so not connect", f"chmod o+x '{at}'")]
        if may & WRITE and not _kept_by_sticky_bit(user, at, name):
            return [_writable(user, at)]
    return [Exposure(folder, f"can list '{folder}'", f"chmod go-r '{folder}'")] if _may(user, folder) & READ else []


def _relay_of(config: SiteConfig) -> User:
    own = os.geteuid()
    if config.site.relay_user is None and config.site.trust_relay:
        return User(str(own), own, None)
    if config.site.relay_user is None:
        raise ConfigError(
            "site.relay_user: is missing; name the user that SuperNode and relay run under (for a trial on one "
            "machine, site.trust_relay = true lets them run under the agent's own)"
        )
    user = user_of(config.site.relay_user)
    if user.uid == own and not config.site.trust_relay:
        raise ConfigError(
            f"site.relay_user = '{user.name}': is the agent's own user, so shipped code could read all that the agent "
            "reads; run SuperNode under another (for a trial on one machine: site.trust_relay = true)"
        )
    return user


def _exposures(user: User, path: Path, seen: set[str], forbidden: int) -> Iterator[Exposure]:
    if user.uid == 0:
        yield Exposure(path, "is root, who reads everything", "run SuperNode under a user of its own")
        return
    passed, end = _way(path)
    for folder, name in passed:
        may = _may(user, folder) if folder.exists() else 0
        if not may & ENTER:
            return
        if may & WRITE and not _kept_by_sticky_bit(user, folder, name):
            yield _writable(user, folder)
            return
    yield from _exposed_at(user, str(end), seen, forbidden)


def _exposed_at(user: User, end: str, seen: set[str], forbidden: int) -> Iterator[Exposure]:
    """The same of where a way ends: the user can go there, and can put nothing else in its place.

    So it is of all that lies in a folder that the user cannot write; only a link there leads another way. Tens of
    thousands of files are looked at within a second, which an installation has.
    """
    if end in seen:
        return
    try:
        status = os.stat(end)
    except (FileNotFoundError, NotADirectoryError):  # not there yet, or no longer
        return
    seen.add(end)
    may = _may(user, end, status)
    if may & forbidden:
        yield _open(user, Path(end), forbidden)
    elif stat.S_ISDIR(status.st_mode) and may & ENTER:
        with os.scandir(end) as entries:
            inside = sorted((entry.name, entry.is_symlink()) for entry in entries)
        for name, is_link in inside:
            at = os.path.join(end, name)
            yield from (
                _exposures(user, Path(at), seen, forbidden) if is_link else _exposed_at(user, at, seen, forbidden)
            )


def _way(path: Path) -> tuple[list[tuple[Path, str]], Path]:
    """Every folder passed on the way to a path, with the name looked up in it, and where the way ends; links followed.

    Raises:
        OSError: too many links.
    """
    passed: list[tuple[Path, str]] = []
    at, ahead, links = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    while ahead:
        name = ahead.pop()
        passed.append((at, name))
        if name == "..":
            at = at.parent
        elif (at / name).is_symlink():
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = Path(os.readlink(at / name))
            at = Path("/") if target.is_absolute() else at
            ahead += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            at = at / name
    return passed, at


def _may(user: User, path: Path | str, status: os.stat_result | None = None) -> int:
    """The mode bits (rwx) that the user has on a path, or can give itself.

    Args:
        status: of the path, if it is known.
    """
    status = status or os.stat(path)
    if user.uid in (0, status.st_uid):
        return READ | WRITE | ENTER
    group, other = status.st_mode >> 3 & 7, status.st_mode & 7
    if group == other:
        return other
    if user.groups is None or _has_access_list(path):  # of a list, the group's bits are the most that it can grant
        return group | other
    return group if status.st_gid in user.groups else other


def _has_access_list(path: Path | str) -> bool:
    try:
        os.getxattr(path, ACCESS_LIST)
    except (OSError, AttributeError):  # none, or a system without such
        return False
    return True


def _kept_by_sticky_bit(user: User, folder: Path, name: str) -> bool:
    """Whether the entry of a folder, like ``/tmp``, in which all may write is safe from the user all the same."""
    status, entry = folder.stat(), folder / name
    return (
        bool(status.st_mode & stat.S_ISVTX)
        and os.path.lexists(entry)
        and user.uid not in (0, status.st_uid, entry.lstat().st_uid)
    )


def _open(user: User, path: Path, forbidden: int) -> Exposure:
    if path.stat().st_uid == user.uid:
        return Exposure(path, f"owns '{path}'", "chown it to the agent's user")
    if not forbidden & READ:
        return Exposure(path, f"can write '{path}'", f"chmod go-w '{path}'")
    verb = "list" if path.is_dir() else "read"
    return Exposure(path, f"can {verb} or write '{path}'", f"chmod go-rwx '{path}'")


def _writable(user: User, folder: Path) -> Exposure:
    owns = folder.stat().st_uid == user.uid
    remedy = f"chown '{folder}' to the agent's user" if owns else f"chmod go-w '{folder}'"
    return Exposure(folder, f"can put something else in its place in '{folder}'", remedy)


def _stand_in() -> int:
    """The user id that stands for users without a number in this process's user namespace; see user_namespaces(7)."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return 65534
