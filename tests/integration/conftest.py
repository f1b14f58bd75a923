"""A Flower deployment as a fixture; ``from deployment import Deployment`` works in the tests beside this file too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

# The test folders are no packages; last, so that nothing is hidden by a module beside this file.
sys.path.append(str(Path(__file__).parent))

from agents import Federation
from deployment import Deployment

SITES = {site: {"agent-timeout": 2.0} for site in ("north", "south", "west")}
"""The sites of ``triage_data``; their relays do not wait long for an agent that is not there."""

_live: list[Deployment] = []
_live_federations: list[Federation] = []


@pytest.fixture(scope="session")
def federation(tiny_bert: Path, triage_data: Path) -> Iterator[Federation]:
    """A running deployment with an agent at each of the three sites, shared by all tests; leave it as it was found."""
    with Federation(Deployment(SITES), triage_data, tiny_bert) as running:
        _live_federations.append(running)
        yield running
        _live_federations.remove(running)


@pytest.fixture(scope="session")
def deployment(federation: Federation) -> Deployment:
    """The same deployment, for tests that have no use for agents; leave it whole."""
    return federation.deployment


@pytest.fixture
def start_deployment() -> Iterator[Callable[..., Deployment]]:
    """Start deployments of one's own, to be killed in part or whole; takes the arguments of ``Deployment``."""
    with ExitStack() as stack:

        def start(
            sites: Sequence[str] | Mapping[str, Mapping[str, str | int | float | bool]] = ("site-1", "site-2"),
            **settings: Any,
        ) -> Deployment:
            return _start(stack, sites, **settings)

        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of the running deployments below a failure of a test that uses one."""
    report = yield
    used = set(getattr(item, "fixturenames", ()))
    if report.failed and used & {"federation", "start_deployment"}:
        for running in (*_live, *(one.deployment for one in _live_federations)):
            report.sections.append((f"Deployment in {running.folder}", running.logs()))
        for shared in _live_federations:
            report.sections.append(("Agents", shared.logs()))
    return report


def _start(stack: ExitStack, *arguments: Any, **settings: Any) -> Deployment:
    running = stack.enter_context(Deployment(*arguments, **settings))
    _live.append(running)
    stack.callback(_live.remove, running)
    return running
