"""What a GPU or TPU draws and how fast: the default pipelines of slcp, drawn there and on the same machine's CPU.

    python benchmarks/accelerator.py MLP Flux1 Flux1Joint Simformer --nsteps 1000

For each network: its default pipeline is trained for `--nsteps` on 30,000 simulations, on the accelerator, and the run directory is drawn
from on the accelerator and, in a process of its own, on the CPU. The draws must be the same bits when drawn again, when more of them are
asked for and when drawn in a batch; what another tile and what the CPU change is given in posterior standard deviations. Rates are the
best of three, of one observation, over tiles. Each finding is printed and appended to benchmarks/results/accelerator.jsonl as it is made.
The exit status is 1 where bits were not the same, or another tile's draws not within 1e-4 standard deviations.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, append, best_rate, busy_cores, provenance

RESULTS = HERE / "results" / "accelerator.jsonl"
NSIMS, COMPARED, DENSITIES, OBSERVATIONS = 30_000, 2_048, 256, 3
TILES = ("8x256", "32x512", "128x512", "512x512")
WITHIN = 1e-4  # posterior standard deviations, across tile shapes


def train(network: str, run: str, nsteps: int, dtype: str) -> dict[str, Any]:
    import jax
    from flax import nnx

    from distsbi.pipelines import PIPELINES
    from distsbi.tasks import get_task

    task, cls = get_task("slcp"), PIPELINES[f"{network}Flow"]
    pairs = jax.device_get(jax.jit(task.pairs, static_argnums=1)(jax.random.key(100), NSIMS))
    pipeline = cls(
        pairs, None, task.dim_theta, task.dim_x, prior=task.prior, params={"dtype": dtype} if dtype else None,
        training_config={"nsteps": nsteps, "early_stopping": False, "show_progress": False},
    )  # fmt: skip
    start = time.perf_counter()
    losses, val_losses = pipeline.train(nnx.Rngs(0))
    seconds = time.perf_counter() - start
    pipeline.save(run)
    facts = pipeline.posterior.facts["training"]
    return {
        "dtype": dtype,
        "updates": facts["steps"],
        "batch_size": facts["config"]["batch_size"],
        "updates_per_second": facts["updates_per_second"],
        "seconds_training": round(seconds, 1),  # with compilation and the choice of the grid
        "loss": round(float(losses[-1]), 4),
        "val_loss": round(float(min(val_losses)), 4),
    }


def questions(run: str) -> tuple[Any, np.ndarray]:
    """The posterior and the observations that it is asked for, simulated with key 7."""
    import jax

    import distsbi
    from distsbi.tasks import get_task

    task = get_task("slcp")
    _, x = jax.device_get(jax.jit(task.pairs, static_argnums=1)(jax.random.key(7), OBSERVATIONS))
    return distsbi.load(run), np.asarray(x).reshape(OBSERVATIONS, task.dim_x, 1)


def draw(run: str, out: str) -> None:
    """What the CPU says, into a file."""
    posterior, xs = questions(run)
    theta = posterior.sample_batched(1, xs, COMPARED)
    np.savez(out, theta=theta, log_prob=posterior.log_prob_batched(theta[:DENSITIES], xs))


def rate_and_first(call: Callable[[int], Any], count: int) -> tuple[float, float]:
    """(items per second of calls of about a second each; seconds of the first call of `count`, with compilation)."""
    start = time.perf_counter()
    call(count)
    first = time.perf_counter() - start
    start = time.perf_counter()
    call(count)
    many = max(count, int(count / (time.perf_counter() - start)))
    return best_rate(lambda: call(many), many), round(first, 1)


def measure(run: str, shapes: list[str], out: str) -> Iterator[dict[str, Any]]:
    """What is known, as it comes to be known: a benchmark that is cut off keeps what it had."""
    from distsbi.sampling import Tile

    posterior, xs = questions(run)
    theta = posterior.sample_batched(1, xs, COMPARED)
    sd = theta.std(axis=0)
    yield {
        "what": "same draws",
        "device": posterior.mesh.devices.flat[0].device_kind,
        "evaluations": posterior.default_solver.evaluations,
        "tile": str(posterior.tile),
        "same_bits": {
            "again": np.array_equal(theta, posterior.sample_batched(1, xs, COMPARED)),
            "extended": np.array_equal(theta[:, 0], posterior.sample(1, xs[:1], 2 * COMPARED)[:COMPARED]),
            "one_by_one": np.array_equal(theta[:, 1], posterior.sample(1, xs[1:2], COMPARED, observation_id=1)),
        },
    }
    for shape in shapes:
        tile = Tile(*map(int, shape.split("x")))
        apart = far(posterior.sample_batched(1, xs, COMPARED, tile=tile), theta, sd)
        rate, first = rate_and_first(lambda n, tile=tile: posterior.sample(2, xs[:1], n, tile=tile), 2 * tile.rows)
        yield {"what": "tile", "tile": shape, "draws_per_second": rate, "first_call_s": first, "sd_from_default": apart}
    many = np.tile(theta[:, 0], (8, 1, 1))
    rate, first = rate_and_first(lambda n: posterior.log_prob(np.resize(many, (n, *many.shape[1:])), xs[:1]), len(many))
    yield {"what": "densities", "per_second": rate, "first_call_s": first}
    tight = posterior.sample_batched(1, xs, COMPARED, solver="tsit5", rtol=1e-6, atol=1e-6)
    yield {"what": "adaptive", "sd_from_adaptive": far(tight, theta, sd)}
    command = [sys.executable, __file__, "--draw", run, out]  # last, for it takes the cores that feed the device
    subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    with np.load(out) as cpu:
        log_prob = posterior.log_prob_batched(cpu["theta"][:DENSITIES], xs)
        yield {
            "what": "the CPU's",
            "sd_from_cpu": far(cpu["theta"], theta, sd),
            "nat_from_cpu": spread(np.abs(cpu["log_prob"] - log_prob)),
        }


def far(a: np.ndarray, b: np.ndarray, sd: np.ndarray) -> dict[str, float]:
    return spread(np.abs(a - b) / sd)


def spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "q99": float(np.quantile(values, 0.99)), "max": float(values.max())}


def tell(results: Path, network: str, found: dict[str, Any]) -> None:
    print(json.dumps({"network": network, **found}), flush=True)
    append(results, {"network": network, **found, **provenance()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["MLP", "Flux1", "Flux1Joint", "Simformer"])
    parser.add_argument("--nsteps", type=int, default=1_000)
    parser.add_argument("--dtype", default="", help="compute dtype of the network; default: its own")
    parser.add_argument("--tiles", nargs="+", default=TILES, help="slots x draws of the tiles whose rates are measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", nargs=2, metavar=("RUN", "OUT"), help=argparse.SUPPRESS)  # the CPU's process
    options = parser.parse_args()
    if options.draw:
        draw(*options.draw)
        return
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        for network in options.networks:
            run, out = f"{scratch}/{network}", f"{scratch}/{network}.npz"
            note = functools.partial(tell, options.results, network)
            note(
                {"what": "training", "busy_before": busy_cores(), **train(network, run, options.nsteps, options.dtype)}
            )
            for found in measure(run, options.tiles, out):
                note(found)
                good &= all(found.get("same_bits", {}).values())
                good &= found.get("sd_from_default", {"max": 0.0})["max"] <= WITHIN
    sys.exit(not good)


if __name__ == "__main__":
    main()
