"""The doorman between callers of the public socket and a server that only it can reach."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client import doorman
from client.doorman import CONNECTIONS, Doorman, NamelessSocket
from common.errors import ConnectionFailed

OWN = frozenset({os.geteuid()})
STRANGERS = frozenset({os.geteuid() + 1})
LIMIT = 5.0


class Server:
    """Listens where it is told; the test is the one who accepts and answers."""

    def __init__(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(LIMIT)
        self.address = ""

    def bind(self, address: str) -> None:
        self.address = address.removeprefix("unix:")
        self.listener.bind(self.address)
        self.listener.listen()

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(LIMIT)
        return connection


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with made.listener:
        yield made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.fixture
def door(path: Path, server: Server) -> Iterator[Doorman]:
    """A doorman who welcomes the user of this test."""
    made = Doorman(path, OWN, server.bind)
    made.start()
    yield made
    made.stop()


def call(path: Path) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(LIMIT)
    try:
        caller.connect(str(path))
    except OSError:
        caller.close()
        raise
    return caller


def heard(connection: socket.socket) -> bytes:
    """All bytes until the other side ends."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads_of_a_doorman() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("doorman", "passage"))]


def until(condition: Callable[[], bool]) -> None:
    """Waits for what threads that nobody can join will do at once."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---------------------------------------------------------------------------------------------------------- passing


def test_bytes_pass_in_both_directions(door: Doorman, server: Server) -> None:
    with call(door.path) as caller, server.accept() as served:
        caller.sendall(b"question")
        assert served.recv(100) == b"question"
        served.sendall(b"answer")
        assert caller.recv(100) == b"answer"


def test_a_caller_that_has_no_more_to_say_still_gets_its_answer(door: Doorman, server: Server) -> None:
    said = os.urandom(3_000_001)
    with call(door.path) as caller, server.accept() as served:
        saying = threading.Thread(target=lambda: (caller.sendall(said), caller.shutdown(socket.SHUT_WR)))
        saying.start()
        assert heard(served) == said
        saying.join()
        served.sendall(b"answer")
        served.shutdown(socket.SHUT_WR)
        assert heard(caller) == b"answer"


def test_when_the_server_ends_the_caller_gets_all_and_is_let_go(door: Doorman, server: Server) -> None:
    with call(door.path) as caller:
        with server.accept() as served:
            served.sendall(b"last words")
        assert heard(caller) == b"last words"
        until(lambda: not door._passages)  # although the caller has not ended
        with pytest.raises(BrokenPipeError):
            caller.sendall(b"more")


def test_when_a_caller_vanishes_the_server_sees_the_end(door: Doorman, server: Server) -> None:
    with call(door.path) as caller, server.accept() as served:
        caller.sendall(b"half a quest")
        caller.close()
        assert heard(served) == b"half a quest"


# -------------------------------------------------------------------------------------------------------- strangers


def test_a_stranger_is_closed_before_a_byte_passes(
    path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Where these tests run as root, this also shows that root is a stranger unless it is listed."""
    door = Doorman(path, STRANGERS, server.bind)
    door.start()
    for _ in range(20):
        with call(path) as caller, pytest.raises((BrokenPipeError, ConnectionResetError, EOFError)):
            caller.sendall(b"let me in")
            if caller.recv(1) == b"":
                raise EOFError
    door.stop()
    server.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    (record,) = caplog.records  # one line in so many seconds, not one for each
    assert record.levelno == logging.WARNING and record.getMessage() == (
        f"turned away a caller (user {os.geteuid()}, process {os.getpid()}), who is not welcome; 1 so far"
    )


def test_later_lines_count_those_that_were_not_told(
    path: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 5.0, 11.0, 11.0])  # told, not yet again, told
    monkeypatch.setattr(doorman.time, "monotonic", lambda: next(now))
    door = Doorman(path, STRANGERS, server.bind)
    door.start()
    for _ in range(3):
        with call(path) as caller:
            assert heard(caller) == b""
    door.stop()
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == ["1 so far", "3 so far"]


@pytest.mark.parametrize(("welcome", "mode"), [(OWN, 0o600), (STRANGERS, 0o666), (OWN | STRANGERS, 0o666)])
def test_the_socket_opens_to_other_users_only_where_one_is_welcome(
    path: Path, server: Server, welcome: frozenset[int], mode: int
) -> None:
    door = Doorman(path, welcome, server.bind)
    status = path.stat().st_mode
    door.start()
    door.stop()
    assert stat.S_ISSOCK(status) and stat.S_IMODE(status) == mode


def test_a_folder_made_for_the_socket_can_be_entered_and_not_listed_whatever_the_umask(
    tmp_path: Path, server: Server
) -> None:
    path, old = tmp_path / "run" / "agent.sock", os.umask(0o077)
    try:
        Doorman(path, STRANGERS, server.bind).stop()
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o711


def test_one_caller_too_many_is_closed_until_another_leaves(door: Doorman, server: Server) -> None:
    callers = [call(door.path) for _ in range(CONNECTIONS)]
    served = [server.accept() for _ in range(CONNECTIONS)]
    with call(door.path) as late:
        assert heard(late) == b""
    callers.pop(0).close()
    served.pop(0).close()
    until(lambda: len(door._passages) == CONNECTIONS - 1)
    callers.append(call(door.path))
    served.append(server.accept())
    callers[-1].sendall(b"hello")
    assert served[-1].recv(5) == b"hello"
    for connection in (*callers, *served):
        connection.close()


# ---------------------------------------------------------------------------------------------------- nameless socket


def test_only_the_holder_of_a_nameless_socket_can_connect(server: Server) -> None:
    nameless = NamelessSocket(server.bind)
    assert not Path(server.address).parent.exists()
    with pytest.raises(FileNotFoundError):
        call(Path(server.address))
    with nameless.connect() as inside, server.accept() as served:
        inside.sendall(b"hello")
        assert served.recv(5) == b"hello"
    nameless.close()


def test_a_folder_for_temporary_files_with_too_long_a_path_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(ConnectionFailed, match="set TMPDIR to a local folder with a short path"):
        NamelessSocket(server.bind)
    assert list(long.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ the end


def test_stopping_ends_every_connection_and_leaves_nothing(path: Path, server: Server) -> None:
    before = descriptors()
    door = Doorman(path, OWN, server.bind)
    door.start()
    callers = [call(path) for _ in range(3)]
    served = [server.accept() for _ in range(3)]  # who never end by themselves
    door.stop()
    assert [heard(caller) for caller in callers] == [b""] * 3
    for connection in (*callers, *served):
        connection.close()
    assert not path.exists() and descriptors() == before
    assert threads_of_a_doorman() == []


def test_hundreds_of_callers_leave_no_descriptor_behind(door: Doorman, server: Server) -> None:
    before = descriptors()
    for turn in range(200):
        until(lambda: len(door._passages) < CONNECTIONS)
        with call(door.path) as caller, server.accept() as served:
            (caller if turn % 2 else served).sendall(b"half a sentence")
    until(lambda: descriptors() == before)


def test_a_socket_that_took_its_place_is_left_alone(path: Path, server: Server) -> None:
    door = Doorman(path, OWN, server.bind)
    door.start()
    path.rename(path.with_suffix(".aside"))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        door.stop()
        assert path.exists()


def test_a_socket_that_cannot_be_made_is_told_and_leaves_nothing(tmp_path: Path, server: Server) -> None:
    before = descriptors()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectionFailed, match=r"site\.listen = 'unix:.*agent\.sock': cannot be bound"):
        Doorman(tmp_path / "file" / "agent.sock", OWN, server.bind)
    assert descriptors() == before
