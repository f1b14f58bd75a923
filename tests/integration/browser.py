"""A real headless browser, driven over its own debugging pipe: no further packages, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
ANSWER_SECONDS = 60.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
HARMLESS = ("data:", "about:", "chrome:", "devtools:")


def installed() -> str:
    """The browser named by CHROMIUM, or one that is found; the test is skipped where there is none."""
    found = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a headless browser: none of {', '.join(NAMES)} is installed; name one in CHROMIUM")
    return found


class Browser:
    """One page in one browser. Everything it says on its console and every address it asks for is kept.

    Attributes:
        console: messages of the console and of failed loads.
        requests: addresses asked for, other than the page's own file and data within it.
    """

    def __init__(self, folder: Path) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._log = folder.parent / f"{folder.name}.log"
        self._events: list[str] = []
        self._page, self._session, self._number, self._rest = "", "", 0, b""
        to_browser, self._out = (_high(end) for end in os.pipe())
        self._in, from_browser = (_high(end) for end in os.pipe())
        command = [installed(), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT, 0o644)
        # The browser reads from descriptor 3 and writes to 4.
        ends = [
            (os.POSIX_SPAWN_DUP2, here, there)
            for here, there in ((log, 1), (log, 2), (to_browser, 3), (from_browser, 4))
        ]
        self._process = os.posix_spawn(command[0], command, os.environ, file_actions=ends, setsid=True)
        for end in (to_browser, from_browser, log):
            os.close(end)
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
            target = next(one["targetId"] for one in targets if one["type"] == "page")
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser and all its processes."""
        os.close(self._out)
        os.close(self._in)
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)

    def open(self, file: Path, width: int, height: int = 900) -> None:
        """Shows a file in a window of that size, in CSS pixels, and waits until it is loaded."""
        self.console.clear()
        self.requests.clear()
        self._events.clear()
        self._page = file.resolve().as_uri()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        self.call("Page.navigate", url=self._page)
        self._wait_for("Page.loadEventFired")

    def value(self, script: str) -> Any:
        """What a JavaScript expression comes to in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        number = self._number
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": parameters, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def _wait_for(self, event: str) -> None:
        while event not in self._events:
            self._note(self._next())

    def _note(self, message: dict[str, Any]) -> None:
        event, told = message.get("method", ""), message.get("params", {})
        self._events.append(event)
        if event == "Runtime.consoleAPICalled":
            self.console.append(str([argument.get("value") for argument in told["args"]]))
        elif event == "Runtime.exceptionThrown":
            self.console.append(str(told["exceptionDetails"].get("text")))
        elif event == "Log.entryAdded":
            self.console.append(str(told["entry"]["text"]))
        elif event == "Network.requestWillBeSent":
            address = str(told["request"]["url"])
            if address != self._page and not address.startswith(HARMLESS):
                self.requests.append(address)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + ANSWER_SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            if not part:
                raise AssertionError(f"the browser does not answer; it said: {self._log.read_text()[-2000:]}")
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


def _high(descriptor: int) -> int:
    """The same end of a pipe under a number that no standard one has, closed in children."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
