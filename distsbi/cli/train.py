"""`distsbi train`: from a configuration and options to a run directory, in one process or several."""

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distsbi.cli.group import cli
from distsbi.cli.options import DEVICES, MESH, make_mesh, prior_texts, several_processes

if TYPE_CHECKING:
    from distsbi.config import RunConfig
    from distsbi.processes import Rank


@cli.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="YAML file; the options override it.")
@click.option("--task", help="Train on this task: two_moons, gaussian_linear, slcp.")
@click.option("--data", type=click.Path(path_type=Path), help="Train on the pairs in this Parquet folder.")
@click.option(
    "--stream", is_flag=True, default=None, help="Read --data while training. Default: only where it is large (2 GiB)."
)
@click.option(
    "--prior",
    multiple=True,
    metavar="NAME=DISTRIBUTION",
    help="Prior of each parameter of --data in order, e.g. --prior 'mass=LogNormal(0, 0.5)': names it, and keeps draws inside.",
)
@click.option("--missing", is_flag=True, help="NaN in x is an entry that is missing. For mlp and flux1.")
@click.option("-n", "--n", type=click.IntRange(min=1), help="Pairs to simulate. Default: new ones at every step.")
@click.option("--network", help="mlp, flux1, flux1joint or simformer. Default: mlp.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory.")
@click.option("--method", help="flow, diffusion (EDM) or score_matching. Default: flow.")
@click.option("--seed", type=int, help="Seed of weights, order and noise: other runs for an ensemble. Default: 0.")
@click.option(
    "--nsteps",
    type=click.IntRange(min=1),
    help="Updates (of --config with multistep: steps of the optimiser, as there). Default: scaled to the data.",
)
@DEVICES
@MESH
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on with a run in --out.")
@several_processes
@click.option(
    "--ray-workers", type=click.IntRange(min=1), help="Train with Ray Train in so many processes, one on each host."
)
@click.option(
    "--address", help="With --ray-workers: the Ray cluster, or auto. Default: $RAY_ADDRESS, else all of this machine."
)
def train(
    config_path: Path | None,
    out: Path,
    devices: int | None,
    resume: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    distributed: str,
    ray_workers: int | None,
    address: str | None,
    **flags: Any,
) -> None:
    """Train a posterior and write its run directory. Give the same command again to resume an interrupted training.

    Several processes, on one machine or many, train as one when each is given the same command, with its own --process-id or by srun,
    mpirun or on each host of a TPU pod of GKE; or Ray Train starts them with --ray-workers. --out is then a folder that all of them share.
    """
    from distsbi.config import RunConfig, read_config
    from distsbi.processes import find_rank

    rank = find_rank(coordinator, num_processes, process_id, detect=distributed == "auto" and ray_workers is None)
    if rank is not None and ray_workers is not None:
        raise click.UsageError(
            "--ray-workers starts the processes itself; leave out --coordinator, --num-processes and --process-id."
        )
    config = _override(read_config(config_path) if config_path else RunConfig(), **flags)
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"--out {out} is a file; give a folder for the run.")
    if (config.data.task is None) == (config.data.path is None):
        raise click.UsageError("give either --task or --data (or section 'data' of the configuration).")
    if not resume and out.exists() and any(out.iterdir()):
        raise click.UsageError(f"{out} is not empty; leave out --no-resume to go on with it, or give another --out.")
    start = time.perf_counter()
    if ray_workers is None:
        told = train_member(rank, config=config.to_dict(), out=str(out), devices=devices)
    else:
        from distsbi.fanout.launch import launch

        content = config.to_dict()
        if config.data.path is not None:
            content["data"]["path"] = str(Path(config.data.path).absolute())  # workers have folders of their own
        arguments = {"config": content, "out": str(out.absolute()), "devices": devices}
        told = launch("distsbi.cli.train:train_member", arguments, out, ray_workers, address)
    if rank is not None and rank.index:
        return
    best = "" if told["best"] is None else f", best validation loss {told['best']:.4f}, whose weights are kept"
    seconds = f"{time.perf_counter() - start:.0f} s"
    if told["before"]:
        again = "; its sampling grid was chosen again" if told["calibrated"] else ""
        said = f"{told['pipeline']} was trained already{again} ({seconds})"
    else:
        said = f"trained {told['pipeline']} in {seconds}"
    click.echo(f"{said}{best}; run directory {out}")
    click.echo(f"next: distsbi sample {out} --x {told['example']} --nsamples 100000 --out draws.npy")


def train_member(
    rank: "Rank | None", *, config: dict[str, Any], out: str, devices: int | None, join_jax: bool = True
) -> dict[str, Any]:
    """Trains what the configuration says, as one of several processes where `rank` says so, and tells how it went, in plain values."""
    from distsbi import processes
    from distsbi.config import parse_config

    parsed = parse_config(config)
    axes = make_mesh(devices, dict(parsed.mesh) if parsed.mesh else None, rank.count if rank else 1)
    if rank is not None:
        processes.join(rank, join_jax=join_jax)
        if rank.index:
            warnings.simplefilter("ignore")  # process 0 gives them
    pipeline, val_losses, before = _train(parsed, Path(out), axes)
    processes.end()
    held_out = pipeline.example
    short = held_out.size <= 10 and pipeline.ch_cond == 1
    example = ",".join(f"{value:.4g}" for value in held_out.ravel()) if short else "x.npy"
    return {
        "pipeline": type(pipeline).__name__,
        "before": before,
        "calibrated": pipeline.training_config.calibrate,
        "best": min(val_losses) if len(val_losses) else None,
        "example": example,
    }


def _override(config: "RunConfig", **flags: Any) -> "RunConfig":
    """The configuration with the options that were given put over it, checked as a file is."""
    from distsbi.config import parse_config

    content = config.to_dict()
    data = content.setdefault("data", {})
    if flags["task"] is not None or flags["data"] is not None:
        data.pop("task", None)
        data.pop("path", None)
        data.pop("n", None)
        data.pop("stream", None)
    given = {
        ("data", "task"): flags["task"],
        ("data", "path"): str(flags["data"]) if flags["data"] is not None else None,
        ("data", "n"): flags["n"],
        ("data", "stream"): flags["stream"],
        ("strategy", "model"): flags["network"],
        ("strategy", "method"): flags["method"],
        ("training", "nsteps"): flags["nsteps"],
        ("model", "missing"): flags["missing"] or None,
    }
    for (section, key), value in given.items():
        if value is not None:
            content.setdefault(section, {})[key] = value
    for name in ("mesh", "seed"):
        if flags[name] is not None:
            content[name] = flags[name]
    if flags["prior"]:
        content["prior"] = prior_texts(flags["prior"])
    return parse_config(content)


def _train(config: "RunConfig", out: Path, axes: dict[str, int] | None) -> tuple[Any, list[float], bool]:
    """The pipeline that the configuration names, trained, its validation losses, and whether it was trained before this call."""
    from flax import nnx

    from distsbi import keys
    from distsbi.data.pairs import open_pairs
    from distsbi.data.stream import StreamedPairs
    from distsbi.pipelines.given import prior_of
    from distsbi.tasks import get_task
    from distsbi.training.checkpoints import SPEC
    from distsbi.training.loop import run_root

    options: dict[str, Any] = {}
    if config.data.path is not None:
        folder = open_pairs(config.data.path)
        (dim_theta, ch_theta), (*grid, ch_x) = folder.theta_shape, folder.x_shape
        dim_x: Any = tuple(grid) if len(grid) > 1 else grid[0]
        dataset: Any = StreamedPairs(config.data.path) if config.data.stream else config.data.path
        if config.prior and len(config.prior) != dim_theta:
            carried = "" if prior_of(folder) is None else ", or leave the prior out, for these pairs carry theirs"
            raise ValueError(
                f"the prior is of {', '.join(config.prior)}, but the pairs in {config.data.path} have the parameters {', '.join(folder.names)}; "
                f"give a distribution of each, in this order{carried}."
            )
    else:
        task = get_task(config.data.task or "")
        dim_theta, ch_theta, dim_x, ch_x = task.dim_theta, 1, task.dim_x, 1
        options["prior"] = task.prior
        dataset = task if config.data.n is None else task.pairs(keys.pairs_key(keys.as_key(config.seed)), config.data.n)
    if config.seed:  # of 0 are the weights that a pipeline makes by itself
        options["rngs"] = nnx.Rngs(config.seed)
    pipeline = config.make_pipeline(
        dataset, None, dim_theta, dim_x, ch_obs=ch_theta, ch_cond=ch_x, checkpoint_dir=str(out), mesh=axes, **options
    )
    root = run_root(pipeline.training_config)
    before = (Path(root or out) / SPEC).exists()
    _, val_losses = pipeline.train(nnx.Rngs(config.seed))
    return pipeline, val_losses, before
