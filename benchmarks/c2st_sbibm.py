"""C2ST of distsbi's default pipelines on sbibm's tasks, with training time and draws/s; see benchmarks/README.md.

    python benchmarks/c2st_sbibm.py train two_moons MLP --nsims 30000 --seeds 1 2 3
    python benchmarks/c2st_sbibm.py train slcp SimformerDiffusion --nsims 10000 --seeds 1 2 3 --label small
    python benchmarks/c2st_sbibm.py score
    python benchmarks/c2st_sbibm.py queue benchmarks/methods.txt
    python benchmarks/c2st_sbibm.py table

`train --fit` trains and no more, on a GPU say; with the run directory brought here, `train --trained` goes on from it.

A cell is (task, pipeline, nsims, seed, label); a pipeline without a method is flow matching, one that ends in VE is score matching of that
kind (SM: VP). The label names a configuration of configurations.toml. `train` simulates its pairs, trains, measures draws/s and draws 10,000
for each of sbibm's ten observations (the first `--observations`) into benchmarks/.draws/<cell>.npz. `score` compares each observation's draws with
sbibm's reference and appends one JSON line to the results file; `--forest` adds the score of a random forest. `queue` trains and scores
(with a random forest too) the cells of a file, whose lines are words of `train`, each cell in a process of its own; two queues side by side, `--share 1/2`
and `--share 2/2`, have one core each. All skip what is there, so any can be stopped and started again.
"""

import argparse
import fnmatch
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, append, busy_cores, provenance

REFERENCES, DRAWS, RUNS = HERE / ".references", HERE / ".draws", HERE / ".runs"
RESULTS = HERE / "results" / "c2st_sbibm.jsonl"
NSAMPLES, OBSERVATIONS = 10_000, 10
CORES = len(os.sched_getaffinity(0))
MOST_DEVICES = min(CORES, 2)
RATE_SECONDS, RATE_REPEATS = 3.0, 3
MOST_BUSY = 0.2  # cores; timings that began with more busy are "~" in the table


def reference(task: str) -> dict[str, np.ndarray]:
    path = REFERENCES / f"{task}.npz"
    if not path.exists():
        sys.exit(f"{path} is missing; export it with benchmarks/export_references.py (see benchmarks/README.md).")
    with np.load(path) as file:
        return dict(file)


def make_task(name: str) -> Any:
    """distsbi's task, or sbibm's generalised linear model of 100 spikes (T.6 of 2101.04653), x_i ~ Bernoulli(sigmoid(V theta)_i)."""
    from distsbi.tasks import Task, get_task

    if name != "bernoulli_glm_raw":
        return get_task(name)
    import jax
    import numpyro.distributions as dist

    known = reference(name)
    design = known["design_matrix"]
    prior = dist.MultivariateNormal(np.zeros(design.shape[1], np.float32), precision_matrix=known["precision_matrix"])

    def simulate(key: Any, theta: Any) -> Any:
        return jax.random.bernoulli(key, jax.nn.sigmoid(theta @ design.T)).astype(np.float32)

    names = ("offset", *(f"filter_{i}" for i in range(design.shape[1] - 1)))
    return Task(name, prior, simulate, dim_theta=len(names), dim_x=len(design), parameter_names=names)


def devices() -> tuple[int, ...]:
    """Sizes of the meshes that are measured: one virtual device and, where there are two cores, two; of GPUs and TPUs one."""
    import jax

    return tuple(range(1, MOST_DEVICES + 1)) if jax.default_backend() == "cpu" else (1,)


# Train


def train(arguments: argparse.Namespace) -> None:
    # Two virtual devices to measure on, where there are two cores; training uses both.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={MOST_DEVICES}"
    if not arguments.fit:  # before anything is trained that could not be drawn then
        observations = reference(arguments.task)["observations"][: arguments.observations]
    for name, seed in itertools.product(arguments.pipelines, arguments.seeds):
        cell = {"task": arguments.task, "pipeline": name, "nsims": arguments.nsims, "seed": seed}
        cell["label"] = arguments.label
        path = DRAWS / f"{'-'.join(map(str, cell.values()))}.npz"
        run = RUNS / path.stem
        there = run.exists() if arguments.fit else path.exists() and len(read(path)[0]) >= arguments.observations
        if there:
            print(f"{run if arguments.fit else path} is there already", flush=True)
            continue
        if arguments.trained and not run.exists():
            sys.exit(f"{run} is missing; put there what `train --fit` made of this cell.")
        kept = configuration(name, arguments.label)
        given = {
            part: kept.get(part, {}) | json.loads(getattr(arguments, part)) for part in ("training", "model", "options")
        }
        pipeline = pipeline_of(cell, **given)
        made = taken(pipeline, run) if arguments.trained else trained(pipeline, seed, not arguments.fit)
        facts = {**cell, **given, **made}
        if arguments.keep or arguments.fit:
            pipeline.save(str(run))
        if not arguments.fit:
            draws, measured = drawn(pipeline, seed, observations)
            facts |= measured
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}")
            np.savez(temporary, draws=draws, facts=json.dumps(facts))
            temporary.replace(path)
        print(json.dumps(facts, indent=1), flush=True)


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The draws of a cell, and what is to be said about them."""
    with np.load(path) as file:
        return file["draws"], json.loads(str(file["facts"]))


def configuration(pipeline: str, label: str) -> dict[str, dict[str, Any]]:
    """What configurations.toml has for a network under a label."""
    network = re.sub("(Flow|Diffusion|SM|VE)$", "", pipeline)
    return tomllib.loads((HERE / "configurations.toml").read_text()).get(label, {}).get(network, {})


def seeds_of(seed: int) -> Any:
    """Keys of a cell's pairs, of its draws, and of those whose rate is measured."""
    import jax

    return jax.random.split(jax.random.key(seed), 3)


def pipeline_of(cell: dict[str, Any], training: dict[str, Any], model: dict[str, Any], options: dict[str, Any]) -> Any:
    import jax

    from distsbi.pipelines import PIPELINES

    task = make_task(cell["task"])
    pairs = jax.device_get(jax.jit(task.pairs, static_argnums=1)(seeds_of(cell["seed"])[0], cell["nsims"]))
    name, of_method = cell["pipeline"], {}
    if name.endswith("VE"):
        name, of_method = f"{name.removesuffix('VE')}SM", {"sde_type": "VE"}
    return PIPELINES[name if name in PIPELINES else f"{name}Flow"](
        pairs, None, task.dim_theta, task.dim_x, training_config=training, mesh={"data": devices()[-1]}, prior=task.prior,
        **({"params": model} if model else {}), **of_method, **options,
    )  # fmt: skip


def trained(pipeline: Any, seed: int, calibrate: bool) -> dict[str, Any]:
    """Trains; says how it went."""
    from flax import nnx

    busy_before, start, cpu = busy_cores(), time.perf_counter(), time.process_time()
    losses, val_losses = pipeline.train(nnx.Rngs(seed), calibrate=calibrate)
    return {
        "updates": pipeline.posterior.facts["training"]["steps"],
        # with compilation and, where made, the choice of the grid
        "seconds_training": round(time.perf_counter() - start, 1),
        "cpu_seconds_training": round(time.process_time() - cpu, 1),
        "busy_before": busy_before,
        "loss": losses[-1],
        "val_loss": min(val_losses),
    }


def taken(pipeline: Any, run: Path) -> dict[str, Any]:
    """Takes up a cell that was trained elsewhere, and chooses its grid; says how training went there."""
    busy_before = busy_cores()
    pipeline.restore(run)
    facts = pipeline.posterior.facts["training"]
    pipeline.calibrate()
    return {
        "busy_before": busy_before,
        "updates": facts["steps"],
        "seconds_training": facts["seconds"],  # without the choice of the grid
        "trained_on": facts.get("device_kind"),
        "val_loss": facts["best_val_loss"],
    }


def drawn(pipeline: Any, seed: int, observations: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Draws [observations, NSAMPLES, dim_theta], and how they were made."""
    _, draw_key, rate_key = seeds_of(seed)
    posterior, start = pipeline.posterior, time.perf_counter()
    draws = pipeline.sample_batched(draw_key, observations[..., None], NSAMPLES)[..., 0].swapaxes(0, 1)
    drawing = time.perf_counter() - start
    return draws, {
        "evaluations": posterior.default_solver.evaluations,
        "seconds_drawing": round(drawing, 1),
        "draws_per_second": rates(pipeline, observations[0][None, :, None], rate_key),
        "solver": str(posterior.default_solver),
        "tile": str(posterior.tile),
        **provenance(),
    }


def rates(pipeline: Any, x_o: np.ndarray, key: Any) -> dict[str, float]:
    """Draws/s of one observation on meshes of one and two virtual devices: best of interleaved repeats, after a
    warm-up."""
    import tempfile

    import distsbi

    with tempfile.TemporaryDirectory() as folder:
        pipeline.save(f"{folder}/run")
        posteriors = {n: distsbi.load(f"{folder}/run", mesh={"data": n}) for n in devices()}
        best = dict.fromkeys(posteriors, 0.0)
        nsamples = 1_000
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
        draws, facts = read(path)
        samples = reference(facts["task"])["samples"]
        for i in range(min(len(draws), arguments.observations)):
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
    cells = []
    for line in arguments.file.read_text().splitlines():
        if words := shlex.split(line, comments=True):
            given = parser.parse_args(words)
            others = [word for word in words[1:] if word not in given.pipelines]
            cells += [(given, name, seed, others) for seed, name in itertools.product(given.seeds, given.pipelines)]
    share, shares = map(int, arguments.share.split("/"))
    if shares > 1:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[share - 1]})
    failed = []
    for given, pipeline, seed, others in cells[share - 1 :: shares]:
        done = {identity(found) for found in read_results(arguments.results)}
        cell = given.task, pipeline, given.nsims, seed, given.label
        if {(*cell, i + 1) for i in range(given.observations)} <= done:
            continue
        me, name = [sys.executable, __file__], "-".join(map(str, cell))
        words = [given.task, pipeline, *others, "--seeds", str(seed)]
        ran = subprocess.run([*me, "train", *words], check=False).returncode
        if not ran:
            options = ["--forest", "--cells", name, "--observations", str(given.observations)]
            ran = subprocess.run([*me, "score", *options, "--results", arguments.results], check=False).returncode
        if ran:
            failed.append(name)
    if failed:
        sys.exit("failed: " + ", ".join(failed))


# Table


def table(arguments: argparse.Namespace) -> None:
    cells: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in read_results(arguments.results):
        task, pipeline, nsims, seed, label, observation = identity(line)
        wanted = fnmatch.fnmatch(f"{task}-{pipeline}-{nsims}-{label}", arguments.cells)
        if wanted and observation <= arguments.observations:
            cells[task, pipeline, nsims, label][seed].append(line)
    head = (
        "task, pipeline, simulations, label, seeds, scored, mean C2ST, worst, random forest, evaluations, "
        "timed on, cores, seeds timed, training s, draws/s on one virtual device, on two"
    )
    print(f"| {head.replace(', ', ' | ')} |")
    print("|---" * (head.count(", ") + 1) + "|")
    for cell, seeds in sorted(cells.items()):
        lines = [line for scored in seeds.values() for line in scored]
        firsts = [seeds[seed][0] for seed in sorted(seeds)]
        forest = [line["c2st_forest"] for line in lines if "c2st_forest" in line]
        (cpu, cores, trained_on), timed = timed_alike(firsts)
        about = "~" if any(first.get("busy_before", 0) > MOST_BUSY for first in timed) else ""
        rates = [[first["draws_per_second"].get(n) for first in timed] for n in ("1", "2")]
        columns = [
            *cell,
            " ".join(map(str, sorted(seeds))),
            len(lines),
            f"{np.mean([line['c2st'] for line in lines]):.3f}",
            f"{max(line['c2st'] for line in lines):.3f}",
            f"{np.mean(forest):.3f}" if forest else "",
            " ".join(map(str, sorted({first["evaluations"] for first in firsts if "evaluations" in first}))),
            cpu,
            cores,
            " ".join(str(first["seed"]) for first in timed),
            f"{about}{np.mean([training_seconds(first) for first in timed]):.0f}{trained_on and f' on {trained_on}'}",
            *(f"{about}{np.mean(found):,.0f}" if None not in found else "" for found in rates),
        ]
        print(f"| {' | '.join(map(str, columns))} |")


def timed_alike(firsts: list[dict[str, Any]]) -> tuple[tuple[str, int, str], list[dict[str, Any]]]:
    """CPU, cores and, where it is another, device of training that timed most of the seeds (of equals: the last one), and these seeds."""
    alike = defaultdict(list)
    for first in firsts:
        hardware = first["hardware"]
        alike[hardware["cpu"], hardware["cores"], first.get("trained_on") or ""].append(first)
    return max(alike.items(), key=lambda item: (len(item[1]), item[1][-1]["seed"]))


def training_seconds(line: dict[str, Any]) -> float:
    """How long training takes; on one core its CPU seconds, which do not count what shared the core meanwhile."""
    return line["cpu_seconds_training" if line["hardware"].get("cores") == 1 else "seconds_training"]


def words_of_train(one: argparse.ArgumentParser) -> None:
    one.add_argument("task", choices=["two_moons", "gaussian_linear", "slcp", "bernoulli_glm_raw"])
    one.add_argument(
        "pipelines",
        nargs="+",
        metavar="pipeline",
        help="MLP, Flux1, Flux1Joint or Simformer, with Flow (the default), Diffusion, SM or VE",
    )
    one.add_argument("--keep", action="store_true", help="keep the run directory, in benchmarks/.runs/")
    where = one.add_mutually_exclusive_group()
    where.add_argument(
        "--fit",
        action="store_true",
        help="train, keep the run directory, and no more: for --trained on another machine",
    )
    where.add_argument(
        "--trained", action="store_true", help="take the run directory that --fit made, there or on another machine"
    )
    one.add_argument("--nsims", type=int, default=30_000, help="simulations in all; validation is held out of them")
    one.add_argument("--seeds", type=int, nargs="+", default=[1], help="each seeds its pairs, training noise and draws")
    one.add_argument("--training", default="{}", help="training options, JSON; default: the pipeline's own")
    one.add_argument(
        "--model", default="{}", help="fields of the network's parameters, JSON; default: the pipeline's own"
    )
    one.add_argument(
        "--options", default="{}", help='keywords of the pipeline, JSON, such as {"condition_mask": "posterior"}'
    )
    one.add_argument("--label", default="default", help="name of a cell with other options")
    one.add_argument(
        "--observations",
        type=int,
        default=OBSERVATIONS,
        help="how many of the ten, from the first on, are drawn and scored",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help="simulate, train, measure and draw")
    words_of_train(one)
    one.set_defaults(run=train)
    two = commands.add_parser("score", help="C2ST of the draws that have none yet")
    two.add_argument("--cells", default="*", help="pattern of cells, such as 'two_moons-MLP-*'")
    two.add_argument("--jobs", type=int, default=CORES, help="folds scored at once")
    two.add_argument("--observations", type=int, default=OBSERVATIONS, help="how many of the ten, from the first on")
    two.add_argument("--forest", action="store_true", help="score with a random forest too")
    four = commands.add_parser("queue", help="train and score the cells of a file")
    four.add_argument("file", type=Path, help="cells in the words of train")
    four.add_argument(
        "--share", default="1/1", help="of several queues side by side, each on a core of its own: 1/2, 2/2"
    )
    three = commands.add_parser(
        "table", help="a line of Markdown per task, pipeline, simulations and label, over its seeds"
    )
    three.add_argument("--cells", default="*", help="pattern, such as 'slcp-*-10000-*'")
    three.add_argument("--observations", type=int, default=OBSERVATIONS, help="how many of the ten, from the first on")
    for command, run in ((two, score), (three, table), (four, queue)):
        command.add_argument("--results", type=Path, default=RESULTS)
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
