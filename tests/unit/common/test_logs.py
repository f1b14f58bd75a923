"""Logs: on stderr, as text or JSON lines, quiet unless asked."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from datetime import datetime

import pytest

from common.logs import LogFormat, set_up_logging

OWN = ("client", "server", "common", "simulations")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Puts the process's loggers and warning filters back."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("", *OWN)}
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def test_text_goes_to_stderr_and_leaves_stdout_to_results(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogFormat.TEXT, verbose=False)
    logging.getLogger("server.rounds").warning("site %s is late", "north")
    captured = capsys.readouterr()
    assert captured.err == "WARNING server.rounds: site north is late\n"
    assert captured.out == ""


def test_json_is_one_object_a_line_whatever_the_message_holds(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogFormat.JSON, verbose=True)
    logging.getLogger("client.site").info("two\nlines, %s", "später")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("info", "client.site", "two\nlines, später")
    assert datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S%z").tzinfo is not None
    assert "traceback" not in entry


def test_json_carries_the_traceback_of_an_unexpected_error(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogFormat.JSON, verbose=False)
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError:
        logging.getLogger("client.agent").exception("could not be served")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: a defect" in json.loads(line)["traceback"]


def test_information_is_shown_only_when_asked_for_and_only_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose, expected in ((False, ""), (True, "INFO common.model: loaded\n")):
        set_up_logging(LogFormat.TEXT, verbose)
        logging.getLogger("common.model").info("loaded")
        logging.getLogger("some.library").info("chatter")
        assert capsys.readouterr().err == expected


def test_setting_up_twice_does_not_tell_everything_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        set_up_logging(LogFormat.TEXT, verbose=False)
    logging.getLogger("server").error("once")
    assert capsys.readouterr().err == "ERROR server: once\n"


def test_warnings_of_libraries_become_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogFormat.TEXT, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("something is old", UserWarning, stacklevel=1)
    assert "UserWarning: something is old" in capsys.readouterr().err
