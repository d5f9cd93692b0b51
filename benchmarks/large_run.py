"""A simulation, event by event, of a catalog that is larger than this machine: what shard size and failures cost.

    python benchmarks/large_run.py --observations 1e7 --workers 1000 --failures 0 0.01 0.1

W workers take shards from one driver, two each, one at work and one waiting. A shard takes `overhead` + rows x `seconds_per_row` seconds,
times a worker's own speed and a shard's own luck (both log-normal). The driver needs `driver` seconds for each outcome, one at a time. A
worker fails at a rate (per worker and hour, exponential), loses the shard that it is at, and is up again after `restart` seconds. The
result is the time of the run over that of a run without any of these. The figure goes to benchmarks/results/large_run.svg,
the numbers to large_run.jsonl. Nothing here is measured but the defaults of `overhead` and `driver`, which come from
`catalog_scaling.py`.
"""

import argparse
import heapq
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from common import append, provenance

FOLDER = Path(__file__).parent / "results"
SPEED_SPREAD, LUCK_SPREAD = 0.05, 0.03
FINISHES, COMES_UP = 0, 1


def simulate(
    n_rows: int,
    rows: int,
    workers: int,
    seconds_per_row: float,
    overhead: float,
    driver: float,
    failures_per_hour: float,
    restart: float,
    seed: int,
) -> dict[str, float]:
    """Seconds of the run, of the ideal run, and what was lost."""
    rng = np.random.default_rng(seed)
    shards = math.ceil(n_rows / rows)
    last_rows = n_rows - (shards - 1) * rows
    speed = np.exp(rng.normal(0.0, SPEED_SPREAD, workers))
    todo = shards  # the last of them is the short one
    redo: list[int] = []  # rows of shards that were lost
    events: list[tuple[float, int, int, int, float]] = []  # time, kind, worker, rows, when it began
    rate = failures_per_hour / 3600
    fails_at = rng.exponential(1 / rate, workers) if rate else np.full(workers, np.inf)
    free = 0.0  # when the driver is done with what came before
    lost = failures = finished = 0
    now = end = 0.0

    def begin(worker: int, at: float) -> None:
        nonlocal todo
        if redo:
            size = redo.pop()
        elif todo:
            todo -= 1
            size = rows if todo else last_rows
        else:
            return
        took = (overhead + size * seconds_per_row) * speed[worker] * math.exp(rng.normal(0.0, LUCK_SPREAD))
        heapq.heappush(events, (min(at + took, fails_at[worker]), FINISHES, worker, size, at))

    for worker in range(workers):
        begin(worker, 0.0)
    idle: list[int] = []
    while finished < shards:
        now, kind, worker, size, began = heapq.heappop(events)
        if kind == COMES_UP:
            fails_at[worker] = now + rng.exponential(1 / rate)
        elif now >= fails_at[worker]:
            failures += 1
            lost += max(0.0, now - began)
            redo.append(size)
            heapq.heappush(events, (now + restart, COMES_UP, worker, 0, now))
            if idle:  # who had nothing left takes it
                begin(idle.pop(), now)
            continue
        else:
            finished += 1
            end = now
            # the next shard waits at the worker already; only a driver that lags behind by more than that shard holds it up
            free = max(free, now) + driver
            now = max(now, free - (overhead + rows * seconds_per_row))
        if redo or todo:
            begin(worker, now)
        else:
            idle.append(worker)
    ideal = n_rows * seconds_per_row / workers
    return {"seconds": end, "ideal": ideal, "ratio": end / ideal, "failures": failures, "lost_worker_seconds": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=float, default=1e7)
    parser.add_argument("--nsamples", type=float, default=1e4)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--rate", type=float, default=5e4, help="draws/s of one worker")
    parser.add_argument("--overhead", type=float, default=0.05, help="seconds of a shard beside its draws")
    parser.add_argument("--driver", type=float, default=0.002, help="seconds of the driver for a shard")
    parser.add_argument("--restart", type=float, default=60.0, help="seconds until a worker that failed is up again")
    parser.add_argument("--failures", type=float, nargs="+", default=[0.0, 0.01, 0.1, 1.0], help="per worker and hour")
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 30, 100, 300, 1_000, 3_000, 10_000])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    per_row = arguments.nsamples / arguments.rate
    found: list[dict[str, Any]] = []
    for failures in arguments.failures:
        for rows in arguments.rows:
            made = simulate(
                int(arguments.observations), rows, arguments.workers, per_row, arguments.overhead, arguments.driver, failures,
                arguments.restart, arguments.seed,
            )  # fmt: skip
            line = {
                "failures_per_worker_hour": failures,
                "rows_per_shard": rows,
                **{k: round(v, 4) for k, v in made.items()},
            }
            found.append(line)
            print(json.dumps(line), flush=True)
    options = {name: value for name, value in vars(arguments).items() if name not in ("failures", "rows")}
    append(FOLDER / "large_run.jsonl", {**options, "results": found, **provenance()})
    draw(found, arguments)


def draw(found: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "distsbi"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for failures in arguments.failures:
        lines = [line for line in found if line["failures_per_worker_hour"] == failures]
        x = [line["rows_per_shard"] * arguments.nsamples / arguments.rate for line in lines]
        axes.plot(x, [100 * (line["ratio"] - 1) for line in lines], "o-", label=f"{failures:g}")
    axes.set(xscale="log", yscale="log", xlabel="seconds of work in a shard", ylabel="time beyond the ideal run, %")
    axes.set_title(f"{arguments.observations:.0e} observations, {arguments.workers:,} workers (simulated)")
    axes.legend(title="failures per\nworker and hour")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(FOLDER / "large_run.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
