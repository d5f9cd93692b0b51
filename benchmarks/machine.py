"""What the mesh and the memory cost: three measurements of the default MLP pipeline on two_moons.

    python benchmarks/machine.py memory     # peak memory of 1,000,000 draws beyond that of 100,000
    python benchmarks/machine.py devices    # draws/s on two virtual devices against one, and the hash of the draws
    python benchmarks/machine.py updates    # 500 updates on a mesh of two against a mesh of one

Each prints one JSON line and appends it to benchmarks/results/machine.jsonl. `--run` is a run directory of two_moons;
without it an MLP with initial weights is made, whose draws and updates cost the same.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import append, busy_cores, provenance

RESULTS = Path(__file__).parent / "results" / "machine.jsonl"
DEVICES = (1, 2)


def virtual_devices(count: int) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def make_run(path: str) -> None:
    """A run of the default MLP for two_moons with the scales of its pairs and initial weights."""
    from flax import nnx

    pipeline = two_moons({"data": 1})
    pipeline.train(nnx.Rngs(0), nsteps=1)
    pipeline.save(path)


def two_moons(mesh: dict[str, int]) -> Any:
    import jax

    import distsbi

    task = distsbi.get_task("two_moons")
    pairs = jax.device_get(jax.jit(task.pairs, static_argnums=1)(jax.random.key(0), 30_000))
    options = {"show_progress": False, "early_stopping": False}
    return distsbi.MLPFlowPipeline(pairs, None, 2, 2, training_config=options, mesh=mesh, prior=task.prior)


# Memory


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each count in a process of its own, for the peak of a process never goes back."""
    peaks, arrays = [], []
    for count in (100_000, 1_000_000):
        command = [sys.executable, __file__, "draw", "--run", str(arguments.run), "--nsamples", str(count)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        peaks.append(found["peak_mb"])
        arrays.append(found["array_mb"])
    growth = peaks[1] - peaks[0] - (arrays[1] - arrays[0])
    return {"peak_mb": peaks, "array_mb": arrays, "growth_beyond_the_array_mb": round(growth, 1)}


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    virtual_devices(2)
    import jax
    import numpy as np

    import distsbi

    posterior = distsbi.load(arguments.run, mesh={"data": 2})
    draws = posterior.sample(jax.random.key(0), np.zeros((1, 2, 1)), arguments.nsamples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_mb": round(peak / 1e6, 1), "array_mb": round(draws.nbytes / 1e6, 1)}


# Devices


def devices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved repeats in one process; the hash of all draws must not depend on the devices."""
    virtual_devices(max(DEVICES))
    import jax
    import numpy as np

    import distsbi

    x_o, key = np.zeros((1, 2, 1)), jax.random.key(0)
    posteriors = {n: distsbi.load(arguments.run, mesh={"data": n}) for n in DEVICES}
    rates: dict[int, list[float]] = {n: [] for n in DEVICES}
    hashes = set()
    for posterior in posteriors.values():
        posterior.sample(key, x_o, 1_000)
    for _ in range(arguments.repeats):
        for n, posterior in posteriors.items():
            start = time.perf_counter()
            draws = posterior.sample(key, x_o, arguments.nsamples)
            rates[n].append(arguments.nsamples / (time.perf_counter() - start))
            hashes.add(hashlib.sha256(draws.tobytes()).hexdigest())
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    return {
        "draws_per_second": {n: round(statistics.median(r)) for n, r in rates.items()},
        "ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios], "same_hash": len(hashes) == 1,
        "solver": str(posteriors[1].default_solver), "tile": str(posteriors[1].tile),
    }  # fmt: skip


# Updates


def updates(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of 500 updates of the compiled training step, interleaved."""
    virtual_devices(max(DEVICES))
    seconds: dict[int, list[float]] = {n: [] for n in DEVICES}
    steppers = {n: stepper(two_moons({"data": n})) for n in DEVICES}
    for _ in range(arguments.repeats):
        for n, run in steppers.items():
            start = time.perf_counter()
            run(500)
            seconds[n].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "seconds_of_500_updates": {n: round(statistics.median(s), 2) for n, s in seconds.items()},
        "ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios],
    }  # fmt: skip


def stepper(pipeline: Any) -> Callable[[int], None]:
    """Advances a training by a number of updates, 100 a dispatch as `distsbi.training.train` does; compiled already."""
    import jax
    from flax import nnx

    from distsbi import mesh as meshes
    from distsbi.data.standardise import Standardizer
    from distsbi.training.update import Learner

    source, mesh = pipeline._source, pipeline.mesh
    config = pipeline.training_config.resolve(source.size)
    scales = Standardizer.fit(*source.fit(), pipeline._supports)
    graphdef, params, rest = nnx.split(pipeline.model, nnx.Param, ...)
    epoch = source.size // config.batch_size
    learner = Learner(graphdef, rest, pipeline.method, scales, config, mesh, source.draw, epoch=epoch)
    whole = meshes.replicated(mesh)
    data = jax.device_put(source.arrays, whole)
    advance = jax.jit(learner.advance, static_argnums=2, donate_argnums=0, out_shardings=(whole, whole))
    begin = lambda params, key: learner.init(params, key, source.size)  # noqa: E731
    state = jax.jit(begin, out_shardings=whole)(params, jax.random.key(0))

    def run(updates: int) -> None:
        nonlocal state
        for _ in range(updates // 100):
            state, loss = advance(state, data, 100)
        loss.block_until_ready()

    run(100)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "devices", "updates", "draw"])
    parser.add_argument("--run", type=Path, help="a run directory of two_moons; default: initial weights")
    parser.add_argument("--nsamples", type=int, default=300_000, help="draws of each repeat of `devices`")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "draw":  # one process of `memory`
        print(json.dumps(draw(arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.run is None and arguments.what != "updates":
            arguments.run = Path(scratch) / "run"
            subprocess.run([sys.executable, "-c", f"import machine; machine.make_run({str(arguments.run)!r})"],
                           cwd=Path(__file__).parent, check=True)  # fmt: skip
        busy_before = busy_cores()
        found = {"memory": memory, "devices": devices, "updates": updates}[arguments.what](arguments)
    line = {"benchmark": arguments.what, **found, "busy_before": busy_before, **provenance()}
    print(json.dumps(line))
    append(RESULTS, line)


if __name__ == "__main__":
    main()
