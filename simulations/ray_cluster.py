"""Joining a Ray cluster, or starting a local one for the time of a run, and leaving nothing of it behind.

Ray's own ways are kept out of sight here: it would wait for minutes at an address where nothing listens, open a
dashboard, count cores that this process may not use, and warn about itself.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc

from common.errors import ConfigError, ConnectionFailed
from common.sections import SimulationSection

OBJECT_STORE = 128 * 2**20
"""Bytes of shared memory of a local Ray. Only messages pass through it; what does not fit goes to the disk."""
ANSWERS_WITHIN = 5.0
"""Seconds until something must answer at ``simulation.ray_address``."""
SHORT = "/tmp"
"""Where a local Ray has its files while it runs. The names of its sockets must not be longer than 107 bytes."""
TOO_SLOW = "timed out during startup"
"""What Ray says when its own processes take more than 30 s to start."""
NO_PHONE_HOME = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "TOKENIZERS_PARALLELISM")
"""Variables that actors get from this process where it has them."""


def _installed() -> ModuleType:
    """Ray.

    Raises:
        ConfigError: it is not installed.
    """
    for name, value in NO_PHONE_HOME.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "simulation.engine = 'ray': Ray is not installed; pip install 'consilium[ray]', or leave the setting out"
        ) from None
    return ray


@contextmanager
def cluster(section: SimulationSection) -> Iterator[None]:
    """While this lasts, this process is the driver of a Ray job, if the settings say so: of a cluster, or of a local
    Ray of its own.

    Raises:
        ConfigError: Ray is not installed, or this process is a driver already.
        ConnectionFailed: no Ray of this version answers at the address.
    """
    if section.engine != "ray":
        yield
        return
    if section.ray_address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on all network interfaces, so whoever has no token is turned away. It reads this when imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    ray = _installed()
    if ray.is_initialized():
        raise ConfigError("simulation.engine = 'ray': this process is a Ray driver already; one run at a time")
    folder = None if section.ray_address else Path(tempfile.mkdtemp(prefix="ray-", dir=SHORT))
    try:
        with _without_warnings():
            if folder is None:
                _join(ray, str(section.ray_address))
            else:
                _start(ray, folder)
        with _leaving_at_sigterm(), redirect_stdout(sys.stderr):  # Ray prints what its nodes say
            yield
    finally:
        with _without_warnings():
            ray.shutdown()
            gc.collect()  # its process objects warn when they are collected
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _start(ray: Any, folder: Path) -> None:
    """With every core that this process may use, and every GPU that Ray finds."""
    try:
        ray.init(
            address="local",
            num_cpus=usable_cores(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            _temp_dir=str(folder),
            **_of_every_job(),
        )
    except Exception as error:  # Ray's own kind of a start that took more than 30 s
        if TOO_SLOW not in str(error):
            raise
        raise ConnectionFailed(
            "simulation.engine = 'ray': Ray did not start on this machine within 30 s; try again when it is less busy, "
            "or use simulation.engine = 'in-process'"
        ) from None


def _join(ray: Any, address: str) -> None:
    if address != "auto":
        _check_answers(address)
    try:
        ray.init(address=address, **_of_every_job())
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConnectionFailed(
            f"simulation.ray_address = '{address}': cannot be joined ({said}); start Ray on this host too, with the "
            "same versions of Ray and Python ('ray start --address=HOST:PORT')"
        ) from None


def _check_answers(address: str) -> None:
    """Whether a gRPC server listens, as Ray's head does; Ray itself would try for minutes."""
    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(ANSWERS_WITHIN)
    except grpc.FutureTimeoutError:
        raise ConnectionFailed(
            f"simulation.ray_address = '{address}': no Ray answers there within {ANSWERS_WITHIN:g} s; give the address "
            "that 'ray start --head' printed, or leave it out to start Ray on this machine"
        ) from None
    finally:
        channel.close()


def _of_every_job() -> dict[str, Any]:
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))  # for a checkout that is not installed
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        "runtime_env": {"env_vars": {**NO_PHONE_HOME, **passed_on, "PYTHONPATH": path}},
        "logging_level": "error",
        "log_to_driver": False,
    }


def usable_cores() -> int:
    """Cores that this process may use; Ray would count all of the machine's."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Ray leaves files of its child processes to the garbage collector, and announces changes of its own settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.filterwarnings("ignore", message=".*override accelerator visible devices", category=FutureWarning)
        yield


@contextmanager
def _leaving_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does. Ray's own handler aborts the process, and leaves its files behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
