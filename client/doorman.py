"""Who may speak to the site agent over its unix socket: processes of the users a site names, and nobody else.

gRPC for Python does not tell who has connected. So gRPC listens on a socket that has lost its name, where nobody can
connect, and a doorman at the public socket asks the kernel for the user of each caller (``SO_PEERCRED``, see unix(7))
before a single byte is passed on. Abstract socket names would be simpler, but have no permissions at all. The user is
that of the process which connected, at that moment: a welcome process that lends its connection to others vouches for
them.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import ConnectionFailed

log = logging.getLogger(__name__)

CONNECTIONS = 16
"""Callers served at the same time; one more is closed."""
BUFFER = 256 << 10
"""Bytes that are passed on at once, in each direction of each connection."""
LOG_INTERVAL = 10.0
"""Seconds between two log lines about callers that were turned away."""

_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user, group


class NamelessSocket:
    """A listening socket that only this process can connect to.

    It is bound in a folder of its own (0700), and both are deleted at once, so that no path leads there any more and
    nothing is left behind however the process ends. What remains is a descriptor of the socket's inode.

    Args:
        bind: binds a server to ``unix:PATH``, and lets it listen.

    Raises:
        ConnectionFailed: it cannot.
    """

    def __init__(self, bind: Callable[[str], object]) -> None:
        with tempfile.TemporaryDirectory(prefix="consilium-") as folder:
            path = Path(folder, "agent")
            try:
                bind(f"unix:{path}")
                self._inode = os.open(path, os.O_PATH)
            except (OSError, RuntimeError):
                raise ConnectionFailed(
                    f"'{path}': cannot be bound; set TMPDIR to a local folder with a short path"
                ) from None

    def connect(self) -> socket.socket:
        """A new connection to the server."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"/proc/self/fd/{self._inode}")
        except OSError:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Nobody can connect any more."""
        os.close(self._inode)


class Doorman:
    """Accepts connections at ``path`` and passes those of welcome users on.

    Args:
        path: where the socket is made. Where only the own user is welcome, nobody else can open it (0600); otherwise
            whoever can enter its folder can knock (0666), and the kernel's word decides.
        welcome: user ids; that of root is welcome only if it is listed.
        bind: binds the server behind to ``unix:PATH``, and lets it listen.

    Raises:
        ConnectionFailed: a socket cannot be made, or another agent serves there.
    """

    def __init__(self, path: Path, welcome: frozenset[int], bind: Callable[[str], object]) -> None:
        self.path, self.welcome = path, welcome
        self._server = NamelessSocket(bind)
        try:
            self._listener = _listen(path, 0o600 if welcome <= {os.geteuid()} else 0o666)
        except ConnectionFailed:
            self._server.close()
            raise
        self._inode = path.stat().st_ino
        self._accepting = threading.Thread(target=self._accept, name="doorman", daemon=True)
        self._stopped = threading.Event()
        self._passages: set[_Passage] = set()
        self._turned_away, self._told_at = 0, -LOG_INTERVAL

    def start(self) -> None:
        """Lets callers in from now on."""
        self._accepting.start()

    def stop(self) -> None:
        """Removes the socket and ends every connection."""
        self._stopped.set()
        _end(self._listener)  # wakes accept()
        if self._accepting.is_alive():
            self._accepting.join()
        self._listener.close()
        if self.path.exists() and self.path.stat().st_ino == self._inode:
            self.path.unlink()
        for passage in tuple(self._passages):
            passage.end()
        self._server.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                caller, _ = self._listener.accept()
            except OSError:
                self._stopped.wait(0.1)  # unless it was stopped, this process has no descriptor left
                continue
            if not self._let_in(caller):
                caller.close()

    def _let_in(self, caller: socket.socket) -> bool:
        process, user = _credentials_of(caller)
        if user not in self.welcome:
            self._log("is not welcome", user, process)
            return False
        if len(self._passages) >= CONNECTIONS:
            self._log(f"found {CONNECTIONS} callers before it", user, process)
            return False
        try:
            server = self._server.connect()
        except OSError:
            self._log("cannot be served", user, process)
            return False
        passage = _Passage(caller, server, self._passages.discard)
        self._passages.add(passage)
        try:
            passage.start()
        except RuntimeError:  # there can be no more threads
            self._passages.discard(passage)
            server.close()
            self._log("cannot be served", user, process)
            return False
        return True

    def _log(self, reason: str, user: int, process: int) -> None:
        self._turned_away += 1
        if time.monotonic() - self._told_at >= LOG_INTERVAL:
            self._told_at = time.monotonic()
            log.warning(
                "turned away a caller (user %d, process %d), who %s; %d so far",
                user,
                process,
                reason,
                self._turned_away,
            )


class _Passage(threading.Thread):
    """One caller's connection: what it says is copied to the server by one thread, the answers by another.

    A caller that has no more to say still gets its answers; once the server has ended, nothing can be answered.
    """

    def __init__(self, caller: socket.socket, server: socket.socket, left: Callable[[_Passage], None]) -> None:
        super().__init__(name="passage", daemon=True)
        self._caller, self._server, self._left = caller, server, left

    def run(self) -> None:
        asking = threading.Thread(target=_copy, args=(self._caller, self._server), name="passage in", daemon=True)
        try:
            with self._caller, self._server:
                asking.start()
                _copy(self._server, self._caller)
                _end(self._caller)
                asking.join()
        finally:
            self._left(self)

    def end(self) -> None:
        """Ends both connections; returns when they are closed."""
        for connection in (self._caller, self._server):
            _end(connection)
        self.join()


def _listen(path: Path, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o711)  # whatever the umask: callers must get in, and need not look around
        _make_room(path)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(socket.SOMAXCONN)
    except (OSError, ConnectionFailed) as error:
        listener.close()
        if isinstance(error, ConnectionFailed):
            raise
        raise ConnectionFailed(f"site.listen = 'unix:{path}': cannot be bound ({error.strerror or error})") from None
    return listener


def _make_room(path: Path) -> None:
    """Removes a socket left by a killed agent; refuses if somebody still answers there."""
    if not path.exists():
        return
    if not path.is_socket():
        raise ConnectionFailed(f"site.listen = 'unix:{path}': there is a file that is no socket; give another path")
    with socket.socket(socket.AF_UNIX) as trial:
        trial.settimeout(1.0)
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise ConnectionFailed(
                f"site.listen = 'unix:{path}': another agent is already serving there; stop it first"
            )


def _credentials_of(caller: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel noted them when it connected."""
    process, user, _ = _CREDENTIALS.unpack(caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return process, user


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Passes bytes on until the source ends, and its end as well."""
    buffer = memoryview(bytearray(BUFFER))
    try:
        while count := source.recv_into(buffer):
            sink.sendall(buffer[:count])
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one side is gone, so the other need not wait for it
        _end(source)
        _end(sink)


def _end(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended already
        connection.shutdown(socket.SHUT_RDWR)
