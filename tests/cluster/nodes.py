"""Processes of a cluster's machines, here: started, waited for, and ended by their own numbers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.cluster.manifests import ROOT


def environment(**more: str) -> dict[str, str]:
    """Of a machine: none of Ray's or jax's settings from here but the cache of compiled programs; this Python's programs on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "XLA_", "JAX_PLAT"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        **more,
    }


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def wait_for_port(host: str, port: int, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=1).close()
            return
        assert process.poll() is None, "Ray ended while starting"
        assert time.monotonic() < deadline, f"nothing listens at {host}:{port}"
        time.sleep(0.1)


def end(process: subprocess.Popen, seconds: float = 15) -> None:
    """The process and all that it started, asked first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, seconds)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
