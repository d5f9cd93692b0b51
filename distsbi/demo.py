"""`distsbi demo`: the whole way of the data, once, on a problem whose posterior is known.

    two_moons -> pairs/ -> run/ -> a million draws of one observation -> catalog/ of 300 observations -> posterior.png

Each step is the call that a user would make. The table at the end compares with the exact posterior.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jaxtyping import Float

from distsbi.data.pairs import simulate_pairs
from distsbi.diagnostics import c2st
from distsbi.fanout import sample_catalog
from distsbi.mesh import MeshLike, make_mesh
from distsbi.pipelines import MLPFlowPipeline
from distsbi.sampling import load
from distsbi.tasks import Task, get_task

X_O = (0.0, 0.0)  # both crescents lie well inside the prior
PARTS = ("pairs", "run", "catalog", "catalog.parquet", "posterior.png", "demo.json")
MARK = "demo.json"


def run_demo(
    out: str | os.PathLike[str] = "demo",
    *,
    quick: bool = False,
    mesh: MeshLike = None,
    workers: int = 2,
    program: str = "distsbi",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs all steps into the folder `out` and returns the numbers that it prints; `quick`: with a tenth of the work.

    `program`: how the command line is called in what to type next. An earlier demo in `out` is replaced. Raises ValueError if `out` holds anything else.
    """
    folder = _fresh(Path(out))
    task, mesh = get_task("two_moons"), make_mesh(mesh)
    pairs, nsteps, nsamples, rows = (3_000, 600, 100_000, 30) if quick else (30_000, 4_000, 1_000_000, 300)
    facts: dict[str, Any] = {"devices": mesh.size, "workers": workers, "pairs": pairs, "nsteps": nsteps}
    facts["nsamples"] = nsamples
    clock = _Clock(say, facts)

    with clock(f"1/5  simulate {pairs:,} pairs of {task.name}", "simulate"):
        simulate_pairs(task, 0, pairs, folder / "pairs", progress=False)

    with clock(f"2/5  train MLPFlowPipeline, {nsteps:,} updates on a mesh of {mesh.size}", "train"):
        pipeline = MLPFlowPipeline(
            str(folder / "pairs"),
            None,
            dim_obs=task.dim_theta,
            dim_cond=task.dim_x,
            training_config={"nsteps": nsteps, "checkpoint_dir": str(folder / "run")},
            mesh=mesh,
            prior=task.prior,
        )
        pipeline.train(nnx.Rngs(0))

    with clock(f"3/5  draw {nsamples:,} samples of one observation", "sample"):
        posterior = load(folder / "run", mesh=mesh)
        x_o = np.asarray(X_O, np.float32).reshape(1, task.dim_x, 1)
        start = time.perf_counter()
        sampler = posterior.get_sampler(x_o)
        sampler(jax.random.key(0), nsamples=1)
        facts["compile_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        draws = sampler(jax.random.key(1), nsamples=nsamples)[..., 0]
        facts["draws_per_second"] = nsamples / (time.perf_counter() - start)

    with clock(f"4/5  catalog of {rows} observations x 1,000 draws on {workers} Ray workers", "catalog"):
        theta = _write_catalog(task, rows, folder / "catalog.parquet")
        done = sample_catalog(
            folder / "run", folder / "catalog.parquet", folder / "catalog", nsamples=1_000, workers=workers
        )
        facts["catalog_draws_per_second"] = rows * 1_000 / done.seconds
        facts["catalog_inside_90"] = _inside(done.open().table(["id", "q05", "q95"]), theta)

    with clock("5/5  compare with the exact posterior", "compare"):
        assert task.exact is not None
        exact = np.asarray(task.exact(jax.random.key(2), x_o.ravel(), nsamples))
        few = 1_000 if quick else 5_000
        facts["c2st"] = c2st(draws[:few], exact[:few], n_jobs=2)
        figure(draws, exact, folder / "posterior.png")

    facts["peak_memory_mb"] = peak_memory_mb()
    (folder / MARK).write_text(json.dumps(facts, indent=1))
    say(_report(facts, folder, program))
    return facts


def _fresh(folder: Path) -> Path:
    """The folder, empty of an earlier demo."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found and (MARK not in found or not set(found) <= set(PARTS)):
        raise ValueError(f"{folder} holds {', '.join(found[:3])}, not only an earlier demo; give another --out.")
    for name in found:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("{}")
    return folder


def _write_catalog(task: Task, rows: int, path: Path) -> Float[np.ndarray, "rows dim_theta"]:
    """Fresh observations with ids as a catalog; returns the parameters that made them."""
    theta, x = jax.device_get(task.pairs(jax.random.key(3), rows))
    ids = [f"obs-{i:04d}" for i in range(rows)]
    pq.write_table(pa.table({"id": ids, "x": x[..., 0].tolist()}), path)
    return theta[..., 0]


def _inside(table: pa.Table, theta: Float[np.ndarray, "rows dim_theta"]) -> float:
    """How often the central 90 % interval holds the parameter that made the observation: 0.9 if calibrated."""
    low, high = (np.asarray(table[name].to_pylist()) for name in ("q05", "q95"))
    order = np.argsort(table["id"].to_numpy())
    return float(((low[order] <= theta) & (theta <= high[order])).mean())


def peak_memory_mb() -> float:
    """Peak resident memory of this process, in megabytes (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def figure(draws: Float[np.ndarray, "n 2"], exact: Float[np.ndarray, "n 2"], path: Path) -> None:
    """Two densities side by side, on the same axes and colours. Raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib; install it with `pip install 'distsbi[report]'`.") from error
    low, high = exact.min(axis=0), exact.max(axis=0)
    margin = 0.15 * (high - low)
    extent = list(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))
    bins = int(np.clip(np.sqrt(len(exact)) / 3, 40, 240))
    panels = []
    for sample in (exact, draws):
        panels.append(np.histogram2d(sample[:, 0], sample[:, 1], bins=bins, range=extent, density=True)[0].T)
    top = float(np.quantile(panels[0][panels[0] > 0], 0.99))

    page = Figure(figsize=(8.6, 4.5), dpi=160, layout="constrained")
    FigureCanvasAgg(page)
    axes = page.subplots(1, 2, sharex=True, sharey=True)
    for axis, density, sample, title in zip(axes, panels, (exact, draws), ("exact", "distsbi"), strict=True):
        axis.set_facecolor("#000004")
        image = axis.imshow(
            density, origin="lower", extent=(*extent[0], *extent[1]), cmap="inferno", vmin=0, vmax=top, aspect="auto"
        )
        axis.set_title(f"{title} ({len(sample):,} draws)", fontsize=11)
        axis.set_xlabel(r"$\theta_0$")
        axis.set_box_aspect(1)
    axes[0].set_ylabel(r"$\theta_1$")
    page.colorbar(image, ax=axes, label="density", shrink=0.86, pad=0.015)
    page.suptitle(f"two_moons: p(θ | x = {X_O})", fontsize=12)
    page.savefig(path)


class _Clock:
    """Says what begins, and notes how long it took under `seconds`."""

    def __init__(self, say: Callable[[str], None], facts: dict[str, Any]):
        self.say, self.seconds = say, facts.setdefault("seconds", {})

    def __call__(self, text: str, name: str) -> "_Clock":
        self.say(text)
        self.name = name
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start


def _report(facts: dict[str, Any], folder: Path, program: str) -> str:
    seconds = facts["seconds"]
    rows = [
        ("simulate", f"{seconds['simulate']:.1f} s", f"{facts['pairs']:,} pairs"),
        (
            "train",
            f"{seconds['train']:.1f} s",
            f"{facts['nsteps']:,} updates on a mesh of {facts['devices']}, compilation included",
        ),
        ("sample", f"{seconds['sample']:.1f} s", f"{facts['draws_per_second']:,.0f} draws/s once compiled"),
        (
            "catalog",
            f"{seconds['catalog']:.1f} s",
            f"{facts['catalog_draws_per_second']:,.0f} draws/s with Ray's start",
        ),
        ("compare", f"{seconds['compare']:.1f} s", f"C2ST {facts['c2st']:.3f} (0.5: cannot be told from exact)"),
        ("", "", f"{100 * facts['catalog_inside_90']:.1f} % of true parameters inside 90 % intervals of the catalog"),
        ("total", f"{sum(seconds.values()):.1f} s", f"peak memory {facts['peak_memory_mb']:,.0f} MB"),
    ]
    lines = [f"  {name:<9} {took:>8}   {what}" for name, took, what in rows]
    run, observation = folder / "run", ",".join(map(str, X_O))
    return "\n".join(
        [
            "",
            *lines,
            "",
            f"run directory  {run}",
            f"catalog        {folder / 'catalog'}",
            f"figure         {folder / 'posterior.png'}",
            "",
            "What to type next:",
            f"  {program} sample {run} --x {observation} --nsamples 100000 --out draws.npy",
            f"  {program} info {run}",
            f"  {program} train --task slcp --n 10000 --out runs/slcp",
        ]
    )
