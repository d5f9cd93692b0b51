"""C2ST of distsbi's default pipelines on sbibm's tasks, with training time and draws/s; see benchmarks/README.md.

    python benchmarks/c2st_sbibm.py train two_moons MLP --nsims 30000 --seeds 1 2 3
    python benchmarks/c2st_sbibm.py train slcp SimformerDiffusion --nsims 10000 --seeds 1 2 3
    python benchmarks/c2st_sbibm.py score
    python benchmarks/c2st_sbibm.py queue benchmarks/methods.txt
    python benchmarks/c2st_sbibm.py table

A cell is (task, pipeline, nsims, seed, label); a pipeline without a method is flow matching, one that ends in VE is score matching of that
kind (SM: VP). `train` simulates its pairs, trains, measures draws/s and draws 10,000
for each of sbibm's ten observations into benchmarks/.draws/<cell>.npz. `score` compares each observation's draws with
sbibm's reference and appends one JSON line to the results file; `--forest` adds the score of a random forest. `queue` trains and scores
(with a random forest too) the cells of a file, one a line in the words of `train`, each in a process of its own. All skip what is there, so any can be stopped and
started again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, append, busy_cores, provenance

REFERENCES, DRAWS, RUNS = HERE / ".references", HERE / ".draws", HERE / ".runs"
RESULTS = HERE / "results" / "c2st_sbibm.jsonl"
NSAMPLES, OBSERVATIONS = 10_000, 10
DEVICES = (1, 2)
RATE_SECONDS, RATE_REPEATS = 3.0, 3


def reference(task: str) -> dict[str, np.ndarray]:
    path = REFERENCES / f"{task}.npz"
    if not path.exists():
        sys.exit(f"{path} is missing; export it with benchmarks/export_references.py (see benchmarks/README.md).")
    with np.load(path) as file:
        return dict(file)


# Train


def train(arguments: argparse.Namespace) -> None:
    # Two virtual devices to measure on; training uses both, drawing for the score the first.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(DEVICES)}"
    known = reference(arguments.task)
    for seed in arguments.seeds:
        cell = {"task": arguments.task, "pipeline": arguments.pipeline, "nsims": arguments.nsims, "seed": seed}
        cell["label"] = arguments.label
        path = DRAWS / f"{'-'.join(map(str, cell.values()))}.npz"
        if path.exists():
            print(f"{path} is there already", flush=True)
            continue
        keep = RUNS / path.stem if arguments.keep else None
        options = json.loads(arguments.training), json.loads(arguments.model)
        draws, facts = train_cell(cell, known["observations"], *options, keep)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        np.savez(temporary, draws=draws, facts=json.dumps({**cell, **facts}))
        temporary.replace(path)
        print(json.dumps({**cell, **facts}, indent=1), flush=True)


def train_cell(
    cell: dict[str, Any],
    observations: np.ndarray,
    training: dict[str, Any],
    model: dict[str, Any],
    keep: Path | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draws [10, NSAMPLES, dim_theta] and what is to be said about them."""
    import jax
    from flax import nnx

    import distsbi
    from distsbi.pipelines import PIPELINES

    task = distsbi.get_task(cell["task"])
    data_key, draw_key, rate_key = jax.random.split(jax.random.key(cell["seed"]), 3)
    pairs = jax.device_get(jax.jit(task.pairs, static_argnums=1)(data_key, cell["nsims"]))
    name, options = cell["pipeline"], {}
    if name.endswith("VE"):
        name, options = f"{name.removesuffix('VE')}SM", {"sde_type": "VE"}
    pipeline = PIPELINES[name if name in PIPELINES else f"{name}Flow"](
        pairs, None, task.dim_theta, task.dim_x, training_config=training, mesh={"data": max(DEVICES)}, prior=task.prior,
        **({"params": model} if model else {}), **options,
    )  # fmt: skip
    busy_before, start, cpu = busy_cores(), time.perf_counter(), time.process_time()
    losses, val_losses = pipeline.train(nnx.Rngs(cell["seed"]))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    draws = pipeline.sample_batched(draw_key, observations[..., None], NSAMPLES)[..., 0].swapaxes(0, 1)
    drawing = time.perf_counter() - start
    posterior = pipeline.posterior
    if keep is not None:
        pipeline.save(str(keep))
    facts = {
        "training": training,
        "model": model,
        "updates": pipeline.posterior.facts["training"].get("steps"),
        "seconds_training": round(seconds, 1),  # with compilation and the choice of the grid
        "cpu_seconds_training": round(cpu, 1),
        "evaluations": posterior.default_solver.evaluations,
        "seconds_drawing": round(drawing, 1),
        "busy_before": busy_before,
        "loss": losses[-1],
        "val_loss": min(val_losses),
        "draws_per_second": rates(pipeline, observations[0][None, :, None], rate_key),
        "solver": str(posterior.default_solver),
        "tile": str(posterior.tile),
        **provenance(),
    }
    return draws, facts


def rates(pipeline: Any, x_o: np.ndarray, key: Any) -> dict[str, float]:
    """Draws/s of one observation on meshes of one and two virtual devices: best of interleaved repeats, after a
    warm-up."""
    import tempfile

    import distsbi

    with tempfile.TemporaryDirectory() as folder:
        pipeline.save(f"{folder}/run")
        posteriors = {n: distsbi.load(f"{folder}/run", mesh={"data": n}) for n in DEVICES}
        best = dict.fromkeys(posteriors, 0.0)
        nsamples = 10_000
        for posterior in posteriors.values():
            posterior.sample(key, x_o, nsamples)
        start = time.perf_counter()
        posteriors[1].sample(key, x_o, nsamples)
        nsamples = max(nsamples, int(nsamples * RATE_SECONDS / (time.perf_counter() - start)))
        for _ in range(RATE_REPEATS):
            for n, posterior in posteriors.items():
                start = time.perf_counter()
                posterior.sample(key, x_o, nsamples)
                best[n] = max(best[n], nsamples / (time.perf_counter() - start))
    return {str(n): round(rate) for n, rate in best.items()}


# Score


def score(arguments: argparse.Namespace) -> None:
    from distsbi.diagnostics import c2st

    done = {identity(line) for line in read_results(arguments.results)}
    for path in sorted(DRAWS.glob(f"{arguments.cells}.npz")):
        with np.load(path) as file:
            draws, facts = file["draws"], json.loads(str(file["facts"]))
        samples = reference(facts["task"])["samples"]
        for i in range(len(draws)):
            line = {**facts, "observation": i + 1}
            if identity(line) in done:
                continue
            start = time.perf_counter()
            line["c2st"] = round(c2st(draws[i], samples[i], n_jobs=arguments.jobs), 4)
            if arguments.forest:
                line["c2st_forest"] = round(
                    c2st(draws[i], samples[i], classifier="random_forest", n_jobs=arguments.jobs), 4
                )
            line["seconds_scoring"] = round(time.perf_counter() - start, 1)
            append(arguments.results, line)
            print(f"{path.stem} observation {i + 1}: {line['c2st']:.4f} ({line['seconds_scoring']} s)", flush=True)


def identity(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("task", "pipeline", "nsims", "seed", "label", "observation"))


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


# Queue


def queue(arguments: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    words_of_train(parser)
    failed = []
    for line in arguments.file.read_text().splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        cell = parser.parse_args(words)
        names = [f"{cell.task}-{cell.pipeline}-{cell.nsims}-{seed}-{cell.label}" for seed in cell.seeds]
        done = {identity(found) for found in read_results(arguments.results)}
        wanted = {
            (cell.task, cell.pipeline, cell.nsims, seed, cell.label, i + 1)
            for seed in cell.seeds
            for i in range(OBSERVATIONS)
        }
        if wanted <= done:
            continue
        me = [sys.executable, __file__]
        ran = subprocess.run([*me, "train", *words], check=False).returncode
        for name in names if not ran else ():
            ran |= subprocess.run(
                [*me, "score", "--forest", "--cells", name, "--results", arguments.results], check=False
            ).returncode
        if ran:
            failed.append(line)
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


# Table


def table(arguments: argparse.Namespace) -> None:
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in read_results(arguments.results):
        cells[identity(line)[:-1]].append(line)
    head = "task, pipeline, simulations, seed, label, mean C2ST, worst, scored, training s, draws/s on 1 and 2 devices"
    print(f"| {head.replace(', ', ' | ')} |")
    print("|---" * (head.count(", ") + 1) + "|")
    for cell, lines in sorted(cells.items()):
        scores = [line["c2st"] for line in lines]
        rate = ", ".join(f"{r:,}" for r in lines[0]["draws_per_second"].values())
        columns = [
            *cell,
            f"{np.mean(scores):.3f}",
            f"{max(scores):.3f}",
            len(scores),
            lines[0]["seconds_training"],
            rate,
        ]
        print(f"| {' | '.join(map(str, columns))} |")


def words_of_train(one: argparse.ArgumentParser) -> None:
    one.add_argument("task", choices=["two_moons", "gaussian_linear", "slcp"])
    one.add_argument(
        "pipeline", help="MLP, Flux1, Flux1Joint or Simformer, with Flow (the default), Diffusion, SM or VE"
    )
    one.add_argument("--keep", action="store_true", help="keep the run directory, in benchmarks/.runs/")
    one.add_argument("--nsims", type=int, default=30_000, help="simulations in all; validation is held out of them")
    one.add_argument("--seeds", type=int, nargs="+", default=[1], help="each seeds its pairs, training noise and draws")
    one.add_argument("--training", default="{}", help="training options, JSON; default: the pipeline's own")
    one.add_argument(
        "--model", default="{}", help="fields of the network's parameters, JSON; default: the pipeline's own"
    )
    one.add_argument("--label", default="default", help="name of a cell with other options")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="simulate, train, measure and draw")
    words_of_train(one)
    one.set_defaults(run=train)
    two = commands.add_parser("score", help="C2ST of the draws that have none yet")
    two.add_argument("--cells", default="*", help="pattern of cells, such as 'two_moons-MLP-*'")
    two.add_argument("--jobs", type=int, default=2, help="folds scored at once")
    two.add_argument("--forest", action="store_true", help="score with a random forest too")
    four = commands.add_parser("queue", help="train and score the cells of a file")
    four.add_argument("file", type=Path, help="one cell a line, in the words of train")
    three = commands.add_parser("table", help="a line of Markdown per cell")
    for command, run in ((two, score), (three, table), (four, queue)):
        command.add_argument("--results", type=Path, default=RESULTS)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
