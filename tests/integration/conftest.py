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

from deployment import Deployment

_live: list[Deployment] = []


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """A running deployment with the sites ``site-1`` and ``site-2``, shared by all tests; leave it whole."""
    with ExitStack() as stack:
        yield _start(stack)


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
    if report.failed and {"deployment", "start_deployment"} & set(getattr(item, "fixturenames", ())):
        for running in _live:
            report.sections.append((f"Deployment in {running.folder}", running.logs()))
    return report


def _start(stack: ExitStack, *arguments: Any, **settings: Any) -> Deployment:
    running = stack.enter_context(Deployment(*arguments, **settings))
    _live.append(running)
    stack.callback(_live.remove, running)
    return running
