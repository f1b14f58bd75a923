"""What a hostile ClientApp would do at a site: a program of its own, started by a test, that only needs a socket.

It starts as root, since Python may lie where nobody else can read, and becomes the user it is told to be before it does
anything. Reads one JSON object from stdin: what it has to know for its attempts. Answers with one: ``outcomes``
(attempt → the name of the error that ended it, or what it got) and ``heard`` (call → all bytes that came back,
hexadecimal).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

PATIENCE = 5.0
AT_A_TIME = 6
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 7, 8
END_STREAM, ACKNOWLEDGED, END_HEADERS = 1, 1, 4
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
WIDEST_WINDOW = (1 << 31) - 1 - 65535

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def main() -> None:
    """Becomes another user, attacks, and tells."""
    told = json.load(sys.stdin)
    if told["user"] != os.geteuid():
        os.setgroups([])
        os.setresgid(*[told["user"]] * 3)
        os.setresuid(*[told["user"]] * 3)
    outcomes: dict[str, str] = {}
    for name, path in told.get("paths", {}).items():
        outcomes |= {f"{how} {name}": attempt(action, path) for how, action in ON_PATHS.items()}
    if "process" in told:
        outcomes |= {name: attempt(action, told["process"]) for name, action in ON_PROCESSES.items()}
    if "beside" in told:
        outcomes |= {name: attempt(action, told["beside"]) for name, action in ON_SOCKETS.items()}
    heard = {name: call(told["socket"], path, map(bytes.fromhex, bodies)) for name, path, bodies in told["calls"]}
    heard |= {name: say(told["socket"], bytes.fromhex(said)) for name, said in told.get("noise", {}).items()}
    if "crowd" in told:
        outcomes["crowd"] = str(crowd(told["socket"], told["crowd"]))
    if "flood" in told:
        path, body, number = told["flood"]
        outcomes["flood"], heard["flood"] = flood(told["socket"], path, bytes.fromhex(body), number)
    json.dump({"outcomes": outcomes, "heard": {name: answer.hex() for name, answer in heard.items()}}, sys.stdout)


def attempt(action: Callable[[Any], object], on: Any) -> str:
    """The name of the error, or what was got."""
    try:
        return f"got {action(on)!r}"
    except OSError as error:
        return errno.errorcode[error.errno or 0]


# ---- files and processes


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1000)


def traced(request: int) -> Callable[[int], str]:
    def trace(process: int) -> str:
        if libc.ptrace(request, process, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
        return "traced"

    return trace


def memory(process: int) -> bytes:
    with open(f"/proc/{process}/mem", "rb", buffering=0) as file:
        return os.pread(file.fileno(), 8, 0x400000)


def inner_sockets(process: int) -> list[str]:
    """Tries each name that the kernel lists of sockets bound in folders for temporary files, as a path and abstract."""
    reached = []
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
        names = {line.split()[-1] for line in table if "/consilium-" in line and line.split()[-1].endswith("/agent")}
    for name in names:
        for address in (name, f"\0{name}"):
            with socket.socket(socket.AF_UNIX) as caller, suppress(OSError):
                caller.connect(address)
                reached.append(name)
    if not names:
        raise OSError(errno.ENODATA, "there is no such socket to try")
    return reached


def bind_beside(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.mine")


ON_PATHS: dict[str, Callable[[str], object]] = {
    "read": lambda path: os.listdir(path) if os.path.isdir(path) else read(path),
    "write": lambda path: os.close(
        os.open(f"{path}/x", os.O_CREAT) if os.path.isdir(path) else os.open(path, os.O_RDWR)
    ),
    "open up": lambda path: os.chmod(path, 0o777),
    "delete": lambda path: os.rename(path, f"{path}.gone"),
}
ON_PROCESSES: dict[str, Callable[[int], object]] = {
    "environ": lambda process: read(f"/proc/{process}/environ"),
    "maps": lambda process: read(f"/proc/{process}/maps"),
    "mem": memory,
    "descriptors": lambda process: os.listdir(f"/proc/{process}/fd"),
    "cwd": lambda process: os.readlink(f"/proc/{process}/cwd"),
    "root": lambda process: os.listdir(f"/proc/{process}/root/"),
    "attach": traced(PTRACE_ATTACH),
    "seize": traced(PTRACE_SEIZE),
    "kill": lambda process: os.kill(process, 9),
}
ON_SOCKETS: dict[str, Callable[[str], object]] = {
    "list the socket's folder": lambda path: os.listdir(os.path.dirname(path)),
    "write into the socket's folder": lambda path: os.close(os.open(f"{path}.mine", os.O_CREAT | os.O_WRONLY)),
    "listen in the socket's folder": bind_beside,
    "delete the socket": os.unlink,
    "move the socket": lambda path: os.rename(path, f"{path}.aside"),
    "close the socket": lambda path: os.chmod(path, 0),
    "inner socket": inner_sockets,
}


# ---- the socket


def connected(path: str) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.settimeout(PATIENCE)
    caller.connect(path)
    return caller


def rest_of(caller: socket.socket) -> bytes:
    """All that comes until the other side ends, or nothing comes any more."""
    heard = bytearray()
    with suppress(OSError):
        while part := caller.recv(1 << 16):
            heard += part
    return bytes(heard)


def say(path: str, said: bytes) -> bytes:
    """What comes back for bytes that need not be anything."""
    with connected(path) as caller:
        with suppress(OSError):
            caller.sendall(said)
            caller.shutdown(socket.SHUT_WR)
        return rest_of(caller)


def crowd(path: str, number: int) -> int:
    """How many of so many silent connections are let in at the same time."""
    with ExitStack() as stack:
        callers = [stack.enter_context(connected(path)) for _ in range(number)]
        let_in = 0
        for caller in callers:
            with suppress(OSError):
                let_in += caller.recv(1) != b""  # the server's first word
        return let_in


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


def request(stream: int, path: str, bodies: Iterable[bytes]) -> bytes:
    """A gRPC call; header fields are literals that are not indexed (RFC 7541, section 6.2.2)."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    texts = (text.encode() for field in fields.items() for text in field)
    block = b"".join((b"\0" if n % 2 == 0 else b"") + bytes([len(text)]) + text for n, text in enumerate(texts))
    body = b"".join(b"\0" + struct.pack(">I", len(message)) + message for message in bodies)
    parts = [body[start : start + 16384] for start in range(0, len(body), 16384)] or [b""]
    frames = [frame(HEADERS, END_HEADERS, stream, block), *(frame(DATA, 0, stream, part) for part in parts)]
    return b"".join([*frames, frame(DATA, END_STREAM, stream, b"")])


class Speaker:
    """A connection that speaks HTTP/2 just well enough."""

    def __init__(self, caller: socket.socket) -> None:
        self.caller, self.heard, self._looked_at = caller, bytearray(), 0
        window = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WIDEST_WINDOW))
        caller.sendall(PREFACE + frame(SETTINGS, 0, 0, b"") + window)

    def hear(self, answers: int) -> int:
        """Waits for the ends of so many streams; returns how many there were before the connection's end."""
        ended = 0
        while ended < answers:
            kind, flags = self._frame()
            if kind == SETTINGS and not flags & ACKNOWLEDGED:
                self.caller.sendall(frame(SETTINGS, ACKNOWLEDGED, 0, b""))
            elif kind == GOAWAY or kind is None:
                break
            ended += kind == RST_STREAM or (kind in (DATA, HEADERS) and bool(flags & END_STREAM))
        return ended

    def _frame(self) -> tuple[int | None, int]:
        """Kind and flags of the next frame; its content is only kept."""
        if not self._filled(9):
            return None, 0
        size = int.from_bytes(self.heard[self._looked_at : self._looked_at + 3], "big")
        kind, flags = self.heard[self._looked_at + 3 : self._looked_at + 5]
        if not self._filled(9 + size):
            return None, 0
        self._looked_at += 9 + size
        return kind, flags

    def _filled(self, size: int) -> bool:
        while len(self.heard) < self._looked_at + size:
            try:
                part = self.caller.recv(1 << 16)
            except OSError:
                part = b""
            if not part:
                return False
            self.heard += part
        return True


def call(path: str, method: str, bodies: Iterable[bytes]) -> bytes:
    """All bytes that come back for one call."""
    with connected(path) as caller:
        try:
            speaker = Speaker(caller)
            caller.sendall(request(1, method, bodies))
        except OSError:
            return rest_of(caller)
        speaker.hear(1)
        return bytes(speaker.heard)


def flood(path: str, method: str, body: bytes, number: int) -> tuple[str, bytes]:
    """So many calls over one connection; the number of those that were answered."""
    answered = 0
    with connected(path) as caller:
        speaker = Speaker(caller)
        for start in range(0, number, AT_A_TIME):
            several = range(start, min(start + AT_A_TIME, number))
            caller.sendall(b"".join(request(2 * call + 1, method, [body]) for call in several))
            answered += speaker.hear(len(several))
    return str(answered), bytes(speaker.heard)


if __name__ == "__main__":
    main()
