"""How long a catalog will take, before it is begun.

A rehearsal on this machine samples made-up observations through the very path of a catalog (workers, tiles, files), in
shards of two sizes. The seconds of a shard are a + b rows, so both give the rate of a worker and the overhead of a shard,
and with them

    hours = start-up + ceil(shards / workers) (a + b rows)

for any number of observations and workers of this kind. For another kind of device a rate is given, or estimated from
the arithmetic of a draw and the device's peak.
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distsbi.fanout import catalog as catalogs, cluster
from distsbi.fanout.arguments import check_gpus
from distsbi.fanout.catalog import sample_catalog
from distsbi.networks.base import compute_dtype
from distsbi.sampling import tiles
from distsbi.store import layout, record
from distsbi.store.schema import ROW_GROUP_BYTES, Output

REHEARSED_SHARDS = 4  # for each worker, of either size
# which take one operation a number
ELEMENTWISE = (
    "add",
    "sub",
    "mul",
    "div",
    "max",
    "min",
    "neg",
    "integer_pow",
    "exp",
    "tanh",
    "logistic",
    "erf",
    "rsqrt",
    "sqrt",
)
LARGER = 4  # times the rows of the smaller, as far as `seconds` allow
# Of other devices, with which one worker and two to a GPU come out as on an H200 (float32; benchmarks/README.md): the share of the peak that small
# networks reach, seconds of one evaluation however small (some dozens of kernels), and bytes/s of draws that a worker summarises, encodes and writes,
# with all that a shard takes beside. The share of bfloat16's peak was not measured.
ACHIEVED, LAUNCH_SECONDS, WRITE_BYTES = 0.185, 1e-4, 3.3e7
ROW_BYTES = 200  # of a row's id, status and summaries beside 3 numbers for each parameter
PROCESS_BYTES = 700 * 2**20  # Python, JAX, Arrow and Ray of one worker


@dataclasses.dataclass(frozen=True)
class Device:
    """A device's published peaks (FLOP/s) in products of each compute dtype.

    float32 is that of full float32 products, which "float32" networks ask for: on NVIDIA's GPUs not that of TF32.
    """

    float32: float
    bfloat16: float


DEVICES = {
    "a100": Device(19.5e12, 312e12),
    "h100": Device(67e12, 990e12),
    "h200": Device(67e12, 990e12),
    "l4": Device(30e12, 121e12),
    "t4": Device(8.1e12, 8.1e12),
    "v100": Device(15.7e12, 15.7e12),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a catalog will cost.

    `rate`: draws/s of one worker, `overhead`: seconds of a shard beside its draws, `start_up`: seconds before the first shard; `how`: where
    these come from. `device`: the workers', "" where their rate was given. `seconds`: of the whole run. `stored_bytes`: of the output, without
    compression. `worker_bytes`: of one worker's memory, without an accelerator's own. `tile`: slots and draws.
    """

    observations: int
    nsamples: int
    workers: int
    device: str
    how: str
    rate: float
    overhead: float
    start_up: float
    rows_per_shard: int
    shards: int
    tile: tuple[int, int]
    seconds: float
    stored_bytes: int
    worker_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def plan(
    run: str | os.PathLike[str],
    *,
    observations: float,
    nsamples: float,
    workers: int | None = None,
    device: str | None = None,
    rate: float | None = None,
    rows_per_shard: int | None = None,
    draws: bool = True,
    thin: int = 1,
    cpus_per_worker: int = 1,
    num_gpus_per_worker: float = 0,
    network: str | None = None,
    seconds: float = 15.0,
    **options: Any,
) -> Plan:
    """What `sample_catalog` of so many `observations` with `nsamples` draws each will take.

    Args:
        run: the run directory.
        workers: processes of the run; None: as many as this machine has room for, of a stated device or rate one. More than this machine
            has room for are taken to be as fast as those here.
        device: None: this machine, rehearsed. Else a name of `DEVICES`, whose rate is estimated.
        rate: draws/s of one worker, if it is known; with it nothing is rehearsed.
        rows_per_shard, draws, thin, cpus_per_worker, num_gpus_per_worker, network: as for `sample_catalog`.
        seconds: about how long the draws of the rehearsal take.
        options: solver, steps, ... as for `sample_catalog`.

    Raises ValueError for an unknown device or a TPU, counts (also `thin`) that are no positive whole numbers, or a missing run.
    """
    n_rows, n = _whole("observations", observations), _whole("nsamples", nsamples)
    check_gpus(num_gpus_per_worker)
    here = _room(cpus_per_worker, num_gpus_per_worker if rate is None and device is None else 0)
    if workers is None:  # how many of another kind there are nobody knows
        workers = here if device is None and rate is None else 1
    count = _whole("workers", workers)
    kept = Output(draws=draws, thin=thin).kept(n)
    if device is not None and device.lower().startswith("tpu"):
        raise ValueError(
            f"Ray workers draw catalogs on CPUs and GPUs, not on TPUs; got device {device!r}. A TPU draws one observation, by "
            "sample_dataset (distsbi sample) on a mesh of all its processes; for a catalog give a GPU, or leave device out for this machine."
        )
    if device is not None and device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, or left out for this machine; got {device!r}.")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate must be draws per second of one worker, positive; got {rate!r}.")
    posterior = _load(run, network)
    size = posterior.dim_theta * posterior.ch_theta
    rows = rows_per_shard or catalogs.choose_rows_per_shard(n_rows, n, size, count)
    overhead, start_up, on = 0.0, 20.0, device or ""
    kind = "cpu" if device is None and not num_gpus_per_worker else "gpu"
    tile = posterior.tile_on(kind, n)
    if rate is not None:
        how = "the rate that was given"
    elif device is not None:
        flops, evaluations = flops_per_draw(posterior, **options)
        dtype = compute_dtype(posterior.network)
        peak = DEVICES[device].bfloat16 if dtype == "bfloat16" else DEVICES[device].float32
        computing = flops / (ACHIEVED * peak) + evaluations * LAUNCH_SECONDS / tile.rows
        # workers that share a device: one draws while others write, until the device is always busy
        rate = 1 / max(computing + 4 * size / WRITE_BYTES, computing / min(num_gpus_per_worker or 1.0, 1.0))
        share = f"{num_gpus_per_worker:g} devices a worker" if num_gpus_per_worker else "a device a worker"
        how = (
            f"estimated: {share}, {flops:.2g} FLOP a draw at {ACHIEVED:.0%} of the {dtype} peak, {LAUNCH_SECONDS * 1e6:.0f} µs an evaluation of a tile, draws written at "
            f"{WRITE_BYTES / 1e6:.0f} MB/s; rehearse on that device to know"
        )
    else:
        at_once = min(count, here)
        rate, overhead, start_up, told = _rehearse(
            posterior, str(run), n, rows, at_once, seconds,
            {"cpus_per_worker": cpus_per_worker, "num_gpus_per_worker": num_gpus_per_worker, "network": network,
             "draws": draws, "thin": thin, **options},
        )  # fmt: skip
        how, on = (
            f"rehearsed here with {at_once} worker{'s' if at_once > 1 else ''} at once",
            told["about"]["devices"][0],
        )
        tile = tiles.Tile(*told["definition"]["tile"])
    shards = layout.shard_count(n_rows, rows)
    each = ROW_BYTES + 4 * size * (kept + 5)
    assert rate is not None
    return Plan(
        n_rows, n, count, on, how, rate, overhead, start_up, rows, shards, (tile.slots, tile.draws),
        _total(n_rows, n, rows, count, rate, overhead, start_up), n_rows * each,
        PROCESS_BYTES + shard_bytes(min(rows, n_rows), n, kept, size),
    )  # fmt: skip


def shard_bytes(rows: int, n: int, kept: int, size: int) -> int:
    """Of memory that a worker takes for a shard of `n` draws a row, each of `size` numbers, of which `kept` are written. As draws are summarised
    there are beside them the deviations from their mean, in float64: 3 n. As the kept ones are encoded there are the table, a row group, the
    file's buffer, which doubles as it grows and is copied then, and what the checksum takes: up to 5 where all are kept."""
    return ROW_GROUP_BYTES + 4 * size * rows * (3 * n + 2 * kept)


def _total(n_rows: int, n: int, rows: int, workers: int, rate: float, overhead: float, start_up: float) -> float:
    """Seconds. The last round of shards keeps some workers waiting: it is counted whole, unless it holds less work."""
    rounds = math.ceil(layout.shard_count(n_rows, rows) / workers)
    return start_up + rounds * (overhead + min(rows, n_rows) * n / rate)


def flops_per_draw(posterior: Any, **options: Any) -> tuple[float, int]:
    """Floating-point operations of one draw in all evaluations of the network, and how many these are."""
    import jax
    import jax.numpy as jnp

    from distsbi.networks.base import encode
    from distsbi.sampling import SampleOptions

    rows = 256
    solver = SampleOptions.parse(options).make_solver(posterior.method, posterior.default_solver)
    evaluations = solver.evaluations or 100
    network, scales = posterior.network, posterior.weights.standardizer
    x = jax.ShapeDtypeStruct((1, posterior.dim_x, posterior.ch_x), jnp.float32)
    context = jax.eval_shape(lambda x: encode(network, scales, x)[0], x)
    theta = jax.ShapeDtypeStruct((1, rows, posterior.dim_theta, posterior.ch_theta), jnp.float32)
    step = lambda t, theta, context: network(t, theta, context)  # noqa: E731
    one = _flops(jax.make_jaxpr(step)(jax.ShapeDtypeStruct((), jnp.float32), theta, context).jaxpr)
    return evaluations * one / rows, evaluations


def _flops(jaxpr: Any) -> float:
    """Of a program, with the repetitions of its scans, which XLA's own analysis counts once."""
    from jax.extend.core import jaxprs_in_params

    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        total += params.get("length", 1) * sum(map(_flops, jaxprs_in_params(params)))
        numbers = math.prod(getattr(equation.outvars[0].aval, "shape", ()))
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval.shape
            total += 2 * numbers * math.prod(left[i] for i in params["dimension_numbers"][0][0])
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += 2 * numbers * math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
        elif equation.primitive.name in ELEMENTWISE:
            total += numbers
    return total


def _rehearse(
    posterior: Any, run: str, n: int, rows: int, workers: int, seconds: float, options: dict[str, Any]
) -> tuple[float, float, float, dict[str, Any]]:
    """(draws/s of a worker, seconds of a shard beside its draws, seconds before the first shard, run.json of what was drawn)."""
    least = min(rows, math.ceil(catalogs.SHARD_DRAWS / n))
    with tempfile.TemporaryDirectory(prefix="distsbi-plan-") as folder:
        small, start_up = _times(posterior, run, Path(folder), n, least, workers * REHEARSED_SHARDS, workers, options)
        told = record.read_run(Path(folder) / f"out-{least}")
        assert told is not None
        room = max(1, int(seconds / REHEARSED_SHARDS / small))  # the larger shard, in smaller ones
        most = min(rows, least * min(LARGER, room))
        if most < 2 * least:
            return least * n / small, 0.0, start_up, told
        large, _ = _times(posterior, run, Path(folder), n, most, workers * REHEARSED_SHARDS, workers, options)
    slope = max((large - small) / (most - least), 0.5 * large / most)  # noise may not make draws free
    return n / slope, max(0.0, small - slope * least), start_up, told


def _times(
    posterior: Any, run: str, folder: Path, n: int, rows: int, shards: int, workers: int, options: dict[str, Any]
) -> tuple[float, float]:
    """(seconds from one shard of a worker to its next, seconds before the first) of a catalog of made-up observations."""
    source, out = folder / f"x-{rows}.npz", folder / f"out-{rows}"
    np.savez(source, **made_up(posterior, rows * shards))  # type: ignore[arg-type]
    result = sample_catalog(
        run,
        source,
        out,
        nsamples=n,
        workers=workers,
        address="local",  # the folder is this machine's, also in a job of a cluster, where $RAY_ADDRESS is set
        rows_per_shard=rows,
        id_column=None,
        show_progress=False,
        **options,
    )
    done = [line for line in layout.read_journal(out) if line["event"] == "done"]
    each = float(np.median([line["seconds"] for line in done]))
    last = max(line["time"] for line in done)
    start_up = result.seconds - (last - float(np.mean(first_shards(done)))) - each
    return max(each, _between(done)), max(0.0, start_up)


def _between(done: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from one shard of a worker to its next, with what the driver and the files cost, from when every worker had done one: some are up a
    second before others. 0 where nothing was done after that."""
    firsts = first_shards(done)
    later = [line["time"] for line in done if line["time"] > max(firsts)]
    return (max(later) - max(firsts)) * len(firsts) / len(later) if later else 0.0


def first_shards(done: Sequence[Mapping[str, Any]]) -> list[float]:
    """When each worker had done its first shard."""
    firsts: dict[tuple[str, int], float] = {}
    for line in done:
        worker = line["host"], line["pid"]
        firsts[worker] = min(line["time"], firsts.get(worker, math.inf))
    return list(firsts.values())


def made_up(posterior: Any, n: int) -> dict[str, np.ndarray]:
    """n observations by the columns of a catalog, float32: standard normal in the units of the training set."""
    noise = np.random.default_rng(0).normal(size=(n, posterior.dim_x, posterior.ch_x)).astype(np.float32)
    packed = np.asarray(posterior.scales.inverse_x(noise))
    if posterior.layout.is_plain:
        return {"x": packed}
    parts = posterior.layout.unpack(packed)
    return {name: np.asarray(part) for name, part in parts.items()} if isinstance(parts, dict) else {"x": parts}


def _load(run: Any, network: str | None) -> Any:
    """On the CPU, unless JAX_PLATFORMS leaves it out: the memory of a GPU is for the workers of the rehearsal."""
    import jax

    from distsbi.mesh import cpu_mesh
    from distsbi.sampling import load

    mesh = cpu_mesh()
    with contextlib.nullcontext() if mesh is None else jax.default_device(mesh.devices.flat[0]):
        return load(run, network=network, mesh=mesh)


def _room(cpus: int, gpus: float) -> int:
    """Workers that this machine has room for at once, at least one: that there is none is for Ray to say."""
    room = cluster.own_cpus() // cpus
    return max(1, min(room, int(cluster.own_gpus() / gpus)) if gpus else room)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or value < 1 or value != int(value):
        raise ValueError(f"{name} must be a positive whole number, such as 1e6; got {value!r}.")
    return int(value)


def report(made: Plan) -> str:
    """The plan in lines of text."""
    days, hours = divmod(made.seconds / 3600, 24)
    took = f"{days:.0f} d {hours:.1f} h" if days else f"{hours:.2f} h" if hours >= 1 else f"{made.seconds / 60:.1f} min"
    rows = (
        ("time", f"{took} with {made.workers:,} workers ({made.how})"),
        ("rate", f"{made.rate:,.0f} draws/s a worker{f' on {made.device}' if made.device else ''}, {made.overhead * 1e3:.0f} ms beside for each shard"),
        ("start-up", f"{made.start_up:.0f} s"),
        ("output", f"{_bytes(made.stored_bytes)} for {made.observations:,} rows of {made.nsamples:,} draws: the storage must take {_bytes(made.stored_bytes / made.seconds)}/s"),
        ("memory", f"{_bytes(made.worker_bytes)} a worker"),
        ("shards", f"{made.shards:,} of {made.rows_per_shard:,} rows (--rows-per-shard {made.rows_per_shard})"),
        ("tile", f"{made.tile[0]} slots x {made.tile[1]} draws"),
    )  # fmt: skip
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def to_json(made: Plan) -> str:
    return json.dumps(made.to_dict(), indent=1)
