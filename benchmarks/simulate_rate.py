"""Rate of `distsbi.simulate` on two Ray workers over that of a plain pool of two processes, for a simulator that costs next to nothing.

    python benchmarks/simulate_rate.py --rows 1000000 --repeats 3

The simulator, three numbers with noise, takes a few microseconds, so what is measured is the cost of a row beside it. The plain pool is what
one would write oneself: `multiprocessing.Pool(2)`, chunks of rows, one generator for each chunk, theta drawn and x simulated row by row, the arrays sent back and put together;
it writes no files, notes no failures and gives other numbers for other chunks. Both are timed with start-up (processes, imports, Ray) and
without: the pool from when both processes are up, distsbi, by its journal, from when both workers have done their first shard (one is up half a
second before the other) to the last shard. The two take turns.
The result is appended to benchmarks/results/simulate_rate.jsonl.
"""

import argparse
import functools
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, append, busy_cores, provenance, steady_rate

RESULTS = HERE / "results" / "simulate_rate.jsonl"
WORKERS = 2
PRIOR = {"a": "Uniform(-1, 1)", "b": "Normal(0, 1)"}


def simulate(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    z = rng.normal(size=3)
    return np.array([theta[0] + 0.1 * z[0], theta[0] * theta[1] + 0.1 * z[1], theta[1] + 0.1 * z[2]])


def chunk(start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(start)
    theta = np.stack([rng.uniform(-1, 1, rows), rng.normal(size=rows)], 1)
    return theta.astype(np.float32), np.stack([simulate(row, rng) for row in theta]).astype(np.float32)


def plain_pool(rows: int, size: int) -> dict[str, float]:
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.map(chunk_of_few, range(4 * WORKERS), chunksize=1)
        up = time.monotonic()
        parts = pool.map(functools.partial(chunk, rows=size), range(0, rows, size), chunksize=1)
        theta, x = (np.concatenate(column) for column in zip(*parts, strict=True))
        ended = time.monotonic()
    assert theta.shape == (rows, 2) and x.shape == (rows, 3)
    return {"steady_rows_per_second": rows / (ended - up), "whole_rows_per_second": rows / (ended - began)}


def chunk_of_few(start: int) -> int:
    time.sleep(0.05)  # so that every process gets one
    return len(chunk(start, 10)[0])


def distsbi_simulate(rows: int, size: int | None, out: Path) -> dict[str, Any]:
    import distsbi
    from distsbi.store import layout

    began = time.monotonic()
    result = distsbi.simulate(
        "simulate_rate:simulate", PRIOR, rows, out, workers=WORKERS, shard_size=size, show_progress=False
    )
    ended = time.monotonic()
    assert result.n_ok == rows
    steady, whole = steady_rate(layout.read_journal(out)), rows / (ended - began)
    return {"steady_rows_per_second": steady, "whole_rows_per_second": whole, "shards": result.shards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--chunk", type=int, default=10_000, help="rows of a task of the plain pool")
    parser.add_argument("--shard-size", type=int, help="rows of a shard; default: as distsbi chooses")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON-lines file that the result is added to")
    options = parser.parse_args()
    if options.rows % options.chunk:
        sys.exit("give --rows that are a multiple of --chunk.")

    measured, busy_before = [], busy_cores()
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for name in ("pool", "distsbi"):
                if name == "pool":
                    one = plain_pool(options.rows, options.chunk)
                else:
                    one = distsbi_simulate(options.rows, options.shard_size, Path(scratch) / str(repeat))
                measured.append({"repeat": repeat, "name": name, **one})
                print(
                    f"repeat {repeat}  {name:8} {one['steady_rows_per_second']:,.0f} rows/s steady, "
                    f"{one['whole_rows_per_second']:,.0f} with start-up",
                    flush=True,
                )

    def ratio(key: str) -> float:
        rates = [statistics.median(m[key] for m in measured if m["name"] == name) for name in ("distsbi", "pool")]
        return rates[0] / rates[1]

    result = {
        "benchmark": "simulate_rate",
        "rows": options.rows,
        "ratio": ratio("steady_rows_per_second"),
        "ratio_with_start_up": ratio("whole_rows_per_second"),
        "measured": measured,
        "busy_before": busy_before,
        **provenance(),
    }
    print(f"distsbi over a plain pool: {result['ratio']:.2f}; with start-up {result['ratio_with_start_up']:.2f}")
    append(options.out, result)


if __name__ == "__main__":
    main()
