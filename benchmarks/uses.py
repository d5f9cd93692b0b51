"""What a trained run of two_moons is used for beyond drawing: densities and students. See benchmarks/README.md.

    python benchmarks/c2st_sbibm.py train two_moons MLP --seeds 1 --keep
    python benchmarks/uses.py log_prob --cell two_moons-MLP-30000-1-default
    python benchmarks/uses.py student --cell two_moons-MLP-30000-1-default
    python benchmarks/uses.py conditioning

`log_prob`: points/s on two virtual devices, best of three, and the mean absolute difference from a tight adaptive solve at 1,000 draws
of each of three observations. `student`: two segments distilled from the run; draws/s on two virtual devices, best of three, and C2ST
against sbibm's references beside the teacher's. `conditioning`: draws/s of the default Flux1 with 10 parameters and 100 data (weights at random, 16
evaluations), one-way and joint, interleaved, best of three. Each prints one JSON line and appends it to benchmarks/results/uses.jsonl.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from c2st_sbibm import RUNS, reference
from common import REPEATS, append, best_rate, busy_cores, provenance

RESULTS = Path(__file__).parent / "results" / "uses.jsonl"
DEVICES = 2


def log_prob(arguments: argparse.Namespace) -> dict[str, Any]:
    import distsbi

    posterior = distsbi.load(RUNS / arguments.cell, mesh={"data": DEVICES})
    xs = reference(arguments.cell.split("-")[0])["observations"][:3, :, None]
    theta = posterior.sample_batched(0, xs, 1_000)
    options = json.loads(arguments.options)
    tight = posterior.log_prob_batched(theta, xs, solver="tsit5", rtol=1e-7, atol=1e-7)
    error = np.abs(posterior.log_prob_batched(theta, xs, **options) - tight)
    many = np.repeat(theta[:, 0], 20, 0)
    return {
        "options": options,
        "points_per_second": best_rate(lambda: posterior.log_prob(many, xs[:1], **options), len(many)),
        "mean_error_nat": round(float(error.mean()), 5),
        "q99_error_nat": round(float(np.quantile(error, 0.99)), 4),
    }


def student(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax

    import distsbi
    from distsbi.diagnostics import c2st
    from distsbi.sampling import DistillConfig, train_student

    teacher = distsbi.load(RUNS / arguments.cell, mesh={"data": DEVICES})
    task_name, _, nsims, seed, _ = arguments.cell.split("-")
    task, known = distsbi.get_task(task_name), reference(task_name)
    data_key, draw_key, _ = jax.random.split(jax.random.key(int(seed)), 3)  # the pairs that the teacher was trained on
    _, xs = jax.device_get(jax.jit(task.pairs, static_argnums=1)(data_key, int(nsims)))
    options = json.loads(arguments.distill)
    start = time.perf_counter()
    made, losses = train_student(teacher, xs, DistillConfig(**options))
    seconds = time.perf_counter() - start
    observations = known["observations"][: arguments.observations, :, None]
    scores = {}
    for name, posterior in (("student", made), ("teacher", teacher)):
        draws = posterior.sample_batched(draw_key, observations, 10_000)[..., 0].swapaxes(0, 1)
        scores[name] = [round(c2st(d, r, n_jobs=2), 4) for d, r in zip(draws, known["samples"], strict=False)]
    rate = best_rate(lambda: made.sample(0, observations[:1], 2_000_000), 2_000_000)
    return {
        "distill": options, "boundaries": made.facts["student"]["boundaries"], "seconds_distilling": round(seconds, 1),
        "loss": losses[-1], "draws_per_second": rate, "c2st": scores,
        "mean_c2st": {name: round(float(np.mean(values)), 4) for name, values in scores.items()},
    }  # fmt: skip


def conditioning(arguments: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from flax import nnx

    from distsbi.data.standardise import Standardizer
    from distsbi.methods import FlowMatching
    from distsbi.networks import Flux1, Flux1Params
    from distsbi.sampling import Posterior

    params, counts = Flux1Params.default(10, 100), {"one_way": 8_192, "joint": 1_024}
    made = {
        kind: Posterior(
            Flux1(dataclasses.replace(params, conditioning=kind), nnx.Rngs(0)), FlowMatching(), Standardizer.identity(10, 100),
            mesh={"data": DEVICES},
        )
        for kind in counts
    }  # fmt: skip
    x = np.random.default_rng(0).normal(size=(1, 100, 1)).astype(np.float32)
    rates: dict[str, list[float]] = {kind: [] for kind in made}
    for repeat in range(REPEATS + 1):
        for kind, posterior in made.items():
            start = time.perf_counter()
            posterior.sample(0, x, counts[kind], steps=8)
            if repeat:
                rates[kind].append(counts[kind] / (time.perf_counter() - start))
    best = {kind: round(max(found), 1) for kind, found in rates.items()}
    return {"draws_per_second": best, "ratio": round(best["one_way"] / best["joint"], 2)}


USES = {"log_prob": log_prob, "student": student, "conditioning": conditioning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("use", choices=list(USES))
    parser.add_argument("--cell", default="", help="a run that c2st_sbibm.py train --keep left in benchmarks/.runs/")
    parser.add_argument("--distill", default="{}", help="options of DistillConfig, JSON")
    parser.add_argument("--options", default="{}", help='of log_prob, JSON, such as {"solver": "rk3", "steps": 14}')
    parser.add_argument("--observations", type=int, default=10, help="how many of sbibm's observations are scored")
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    busy_before = busy_cores()
    found = USES[arguments.use](arguments)
    line = {"use": arguments.use, "cell": arguments.cell, **found, "busy_before": busy_before, **provenance()}
    append(RESULTS, line)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
