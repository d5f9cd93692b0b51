"""What every result line says beside its figures: hardware, versions, commit, command, time, and what else the machine was doing."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distsbi.environment import versions

HERE = Path(__file__).parent
REPEATS = 3


def provenance() -> dict[str, Any]:
    return {
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "amx": any(" amx_bf16" in line for line in lines),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that ran, "+" if the package or a benchmark differs from it, or "" outside a checkout."""
    git = ["git", "-C", str(HERE)]
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../distsbi", "*.py"], check=False).returncode
    return found.stdout.strip() + ("+" if changed else "")


def busy_cores(seconds: float = 1.0) -> float:
    """Cores that are busy while this process sleeps: what a timing that begins now would share the machine with. NaN where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")

    def busy() -> int:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
        return user + nice + system + irq + softirq + steal

    before = busy()
    time.sleep(seconds)
    return round((busy() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)


def best_rate(call: Any, count: int) -> float:
    """Of what a call makes so many of, per second: the best of REPEATS after a warm-up."""
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return round(count / min(seconds), 1)


def steady_rate(journal: list[dict[str, Any]]) -> float:
    """Rows/s between the moment when every worker has finished a shard and the last shard."""
    from distsbi.fanout.plan import first_shards

    done = [line for line in journal if line["event"] == "done"]
    start = max(first_shards(done))
    rows = sum(line["rows"] for line in done if line["time"] > start)
    if not rows:
        sys.exit("too little to measure: no shard came after every worker's first; give more --rows.")
    return rows / (done[-1]["time"] - start)


def append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
