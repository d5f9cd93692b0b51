"""What a large catalog takes: the plan of a run beside the run, and the driver's memory as the rows grow.

    python benchmarks/catalog_large.py plan --seconds 600
    python benchmarks/catalog_large.py memory --rows 10000 1000000

The posterior is the default MLP of two_moons with initial weights (a draw costs the same). `plan` rehearses with `distsbi.fanout.plan`, as
`distsbi plan` does, chooses the rows that by the plan take `--seconds`, runs that catalog on Ray, and says by how much the plan was off, with the
rehearsal's overhead of a shard (from shards of two sizes: scheduling, reading, writing, renaming) and the start-up (Ray, workers, first draw). A
run before it fills the compile cache. `memory` draws catalogs of few draws for each row, each with a driver in a process of its own and one
Ray worker, and reports the drivers' peak resident memory. Results go to benchmarks/results/catalog_large.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from catalog_scaling import make_catalog, make_run
from common import HERE, append, busy_cores, provenance

RESULTS = HERE / "results" / "catalog_large.jsonl"
SIZES = 2  # parameters, and data, of two_moons


def plan(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from distsbi.fanout import plan as planning, sample_catalog

    known = {"nsamples": options.nsamples, "workers": options.workers}
    planning.plan(folder / "run", observations=10_000, seconds=2, **known)
    first = planning.plan(folder / "run", observations=10_000, **known)
    rows = round((options.seconds - first.start_up) * first.rate * options.workers / options.nsamples)
    made = planning.plan(folder / "run", observations=rows, **known)
    print(planning.report(made), flush=True)
    make_catalog(folder / "catalog.parquet", rows, SIZES)
    began = time.monotonic()
    sample_catalog(folder / "run", folder / "catalog.parquet", folder / "out", **known)
    took = time.monotonic() - began
    print(f"planned {made.seconds:.0f} s, took {took:.0f} s: {made.seconds / took:.3f}")
    return {"plan": made.to_dict(), "seconds": round(took, 1), "ratio": round(made.seconds / took, 4)}


def memory(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = []
    for rows in options.rows:
        make_catalog(folder / "catalog.parquet", rows, SIZES)
        words = ["drive", str(folder), "--rows", str(rows), "--nsamples", str(options.nsamples)]
        said = subprocess.run(
            [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        ).stdout
        found.append(json.loads(said.splitlines()[-1]))
        print(found[-1], flush=True)
    return {"drivers": found}


def peak_kb() -> int:
    """Of this program. (ru_maxrss begins with that of the process which started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def drive(options: argparse.Namespace) -> None:
    from distsbi.fanout import sample_catalog

    (rows,) = options.rows
    out = options.folder / f"out-{rows}"
    began = time.monotonic()
    result = sample_catalog(
        options.folder / "run", options.folder / "catalog.parquet", out, nsamples=options.nsamples, workers=1
    )
    peak = peak_kb() / 1024
    told = {
        "rows": rows,
        "shards": result.shards,
        "seconds": round(time.monotonic() - began, 1),
        "peak_mb": round(peak, 1),
    }
    print(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("plan", help="a plan, and the run that it is of")
    one.add_argument("--seconds", type=float, default=600.0, help="of the run")
    one.add_argument("--nsamples", type=int, default=1_000)
    one.add_argument("--workers", type=int, default=2)
    two = commands.add_parser("memory", help="peak memory of drivers")
    two.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    two.add_argument("--nsamples", type=int, default=2)
    three = commands.add_parser("drive", help="(one of those drivers)")
    three.add_argument("folder", type=Path)
    three.add_argument("--rows", type=int, nargs=1)
    three.add_argument("--nsamples", type=int)
    options = parser.parse_args()
    if options.command == "drive":
        drive(options)
        return
    busy_before = busy_cores()
    with tempfile.TemporaryDirectory() as scratch:
        make_run(Path(scratch) / "run")
        found = (plan if options.command == "plan" else memory)(options, Path(scratch))
    append(RESULTS, {"benchmark": f"catalog_{options.command}", **found, "busy_before": busy_before, **provenance()})


if __name__ == "__main__":
    main()
