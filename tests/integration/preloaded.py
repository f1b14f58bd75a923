"""A process that has imported everything, and forks: each fork runs ``consilium`` with arguments, and may be mortal.

A program of its own, started by :mod:`mortal_sites`. Orders are JSON messages on the socket at stdin, each with the
descriptor that becomes the fork's stdout and stderr: ``{"run": [arguments], …}``, see :func:`_live`, is answered with
the process id; ``{"wait": ID}`` with the exit code, once the process has ended; -9 is a SIGKILL. ``{"rehearse": FILE,
"plan": …}`` does a round once in this process, so that every fork finds imports done and noise calibrated.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from kill_points import CHANGED_POLICY, PERSON, POINTS, RELAY
from safetensors import safe_open
from safetensors.numpy import load_file

import client.agent
import client.audit_log
import client.ledger_report
import client.privacy.clock
import consilium
from client.assemble import build_site
from client.config import read_site_config
from client.privacy.sampling import RoundSecret
from client.site import Site
from common.code import code_digest
from common.logs import LogFormat, set_up_logging
from common.messages import DescribeRequest, Release, TrainRequest
from common.plan import read_plan
from common.rpc import AgentAddress, RemoteSite

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # see setns(2)


def main() -> NoReturn:
    """Answers until nobody is at the other end."""
    torch.set_num_threads(1)
    set_up_logging(LogFormat.TEXT, verbose=False)
    orders = socket.socket(fileno=0)
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 1)
        if not message:
            os._exit(0)
        order = json.loads(message)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif "rehearse" in order:
            answer = _rehearse(**order)
        elif (answer := os.fork()) == 0:
            orders.detach()
            for stream, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *descriptors, *descriptors)):
                os.dup2(descriptor, stream)
            _live(**order)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps(answer).encode())


def _rehearse(rehearse: str, plan: str, signature: str) -> int:
    asked = read_plan(plan)
    site, resident = build_site(read_site_config(Path(rehearse)))
    site.describe(DescribeRequest(asked.run_id, plan, code_digest(), signature))
    nothing = {name: np.zeros(shape, np.float32) for name, shape in resident.model(asked).spec.shapes}
    done = site.train(TrainRequest(asked.run_id, 1, asked.digest(), nothing))
    site.ledger.close()
    assert isinstance(done, Release), done
    return os.getpid()


def _live(
    run: list[str], point: str | None = None, nth: int = 1, entropy: str | None = None, days: float = 0, disk: int = 0
) -> NoReturn:
    """One life.

    Args:
        run: arguments of ``consilium``; or ``relay``, an agent's address and a file: asks it for the round in the file.
        point: of :mod:`kill_points`; dies there when it comes for the ``nth`` time.
        entropy: the secret of each round is derived from it; else it is the operating system's.
        days: how far the system's clock is set ahead, or back.
        disk: process whose view of the disks this one takes; see :func:`mortal_sites.disk`.
    """
    code: Any = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if disk:
            _share_disks(disk)
        if entropy is not None:
            Site._fresh_secret = lambda site, round: _secret(f"{entropy} {round}")  # type: ignore[method-assign]
        if days:
            _set_clock(timedelta(days=days))
        if point is not None:
            {**POINTS, **CHANGED_POLICY, **RELAY, **PERSON}[point].arm(nth=nth)
        if run[0] == "relay":
            _relay(*run[1:])
            code = 0
        else:
            sys.argv = ["consilium", *run]
            consilium.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # as an interpreter that ends: calls that run are finished
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


def _relay(agent: str, file: str) -> None:
    with safe_open(file, "numpy") as content:
        run, round, digest = (content.metadata()[name] for name in ("run", "round", "plan"))
    with RemoteSite(AgentAddress(agent)) as site:
        print(type(site.train(TrainRequest(run, int(round), digest, load_file(file)))).__name__)


def _secret(text: str) -> RoundSecret:
    return RoundSecret(hashlib.sha256(text.encode()).digest())


def _set_clock(ahead: timedelta) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, zone: Any = None) -> datetime:
            return datetime.now(zone) + ahead

    client.privacy.clock.system_time = lambda: datetime.now(UTC) + ahead
    client.audit_log.datetime = Clock  # type: ignore[misc]


def _share_disks(process: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    for space, kind in (("user", NEW_USER), ("mnt", NEW_MOUNTS)):
        descriptor = os.open(f"/proc/{process}/ns/{space}", os.O_RDONLY)
        here = os.getcwd()
        if library.setns(descriptor, kind):
            raise OSError(ctypes.get_errno(), f"setns {space}")
        os.close(descriptor)
        os.chdir(here)


if __name__ == "__main__":
    main()
