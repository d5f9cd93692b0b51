"""Rate of a catalog on one and on two Ray workers of one core each (with `--gpus`: of four, and a share of the GPUs), and the ratios.

    python benchmarks/catalog_scaling.py --rows 600 --nsamples 10000 --repeats 3

The posterior is `--run`, or the default MLP of two_moons with initial weights (a draw costs the same). Every repeat
runs each number of workers once, in turn, into a folder of its own. The rate is taken from the journal, from when every worker
has finished its first shard to the last shard: start-up and compilation are left out. The rate of the whole call, Ray's
start included, is printed beside it. Workers 0 is this process without Ray, on all its cores. All draws must be the
same. The result is appended to benchmarks/results/catalog_scaling.jsonl.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import HERE, append, busy_cores, provenance, steady_rate

RESULTS = HERE / "results" / "catalog_scaling.jsonl"


def make_run(path: Path) -> None:
    """A run with the default MLP for two_moons, not trained."""
    from flax import nnx

    from distsbi.data import Standardizer, Support
    from distsbi.methods import make_method
    from distsbi.networks import MLP, MLPParams
    from distsbi.sampling import Posterior, save

    pairs = np.random.default_rng(0).uniform(-1, 1, (2, 1000, 2, 1)).astype(np.float32)
    standardizer = Standardizer.fit(pairs[0], pairs[1], [Support(-1, 1)] * 2)
    save(path, Posterior(MLP(MLPParams.default(2, 2), rngs=nnx.Rngs(0)), make_method("flow"), standardizer))


def make_catalog(path: Path, rows: int, dim_x: int) -> None:
    x = np.random.default_rng(1).normal(size=(rows, dim_x)).astype(np.float32)
    pq.write_table(pa.table({"id": np.arange(rows), "x": list(x)}), path)


def measure(
    run: Path, catalog: Path, out: Path, workers: int, nsamples: int, rows_per_shard: int, gpus: float = 0
) -> dict[str, Any]:
    from distsbi.fanout import sample_catalog
    from distsbi.store import layout, record

    began = time.monotonic()
    resources = {"num_gpus_per_worker": gpus / workers, "cpus_per_worker": 4} if gpus and workers else {}
    result = sample_catalog(
        run, catalog, out, nsamples=nsamples, workers=workers, rows_per_shard=rows_per_shard, **resources
    )
    seconds = time.monotonic() - began
    table = pq.read_table(out, columns=["id", "draws"]).sort_by("id").combine_chunks()
    draws = table["draws"].chunk(0).storage.flatten().to_numpy(zero_copy_only=False)
    return {
        "workers": workers,
        "devices": (record.read_run(out) or {})["about"]["devices"],
        "shards": result.shards,
        "steady_draws_per_second": steady_rate(layout.read_journal(out)) * nsamples,
        "whole_draws_per_second": result.n_rows * nsamples / seconds,
        "sha256": hashlib.sha256(draws.tobytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory; default: an untrained MLP")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--nsamples", type=int, default=1000)
    parser.add_argument("--rows-per-shard", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that the workers share; default: they are on CPUs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON-lines file that the result is added to")
    options = parser.parse_args()

    measured, busy_before = [], busy_cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = options.run or folder / "run"
        if options.run is None:
            make_run(run)
        sizes = json.loads((run / "spec.json").read_text())["sizes"]
        make_catalog(folder / "catalog.parquet", options.rows, sizes[2] * sizes[3])
        for repeat in range(options.repeats):
            for workers in options.workers:
                out = folder / f"out-{repeat}-{workers}"
                one = measure(
                    run,
                    folder / "catalog.parquet",
                    out,
                    workers,
                    options.nsamples,
                    options.rows_per_shard,
                    options.gpus,
                )
                measured.append({"repeat": repeat, **one})
                print(
                    f"repeat {repeat}  workers {workers}: {one['steady_draws_per_second']:,.0f} draws/s steady, "
                    f"{one['whole_draws_per_second']:,.0f} with start-up",
                    flush=True,
                )
    medians = {
        workers: statistics.median(m["steady_draws_per_second"] for m in measured if m["workers"] == workers)
        for workers in options.workers
    }
    ratios = {f"{max(medians)} over {n}": medians[max(medians)] / medians[n] for n in medians if n != max(medians)}
    result = {
        "benchmark": "catalog_scaling",
        "steady_draws_per_second": medians,
        "ratios": ratios,
        "same_draws": len({m["sha256"] for m in measured}) == 1,
        "measured": measured,
        "busy_before": busy_before,
        **provenance(),
    }
    print(
        f"{', '.join(f'{name} workers: {ratio:.2f}x' for name, ratio in ratios.items())}; same draws: {result['same_draws']}"
    )
    append(options.out, result)


if __name__ == "__main__":
    main()
