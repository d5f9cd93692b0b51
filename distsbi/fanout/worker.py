"""One worker of a catalog: loads the posterior once, keeps its compiled tile, turns shard numbers into shard files.

Samples never leave it except through the file; what it returns is one small manifest row.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distsbi.compile_cache import use_compile_cache
from distsbi.environment import bit_versions, device_name
from distsbi.fanout.agenda import MachinesFault, Shards, Task
from distsbi.fanout.blame import machines_fault
from distsbi.store import Format, Output, SourceSpec, layout, open_source, schema
from distsbi.store.place import as_place
from distsbi.store.rows import Row
from distsbi.store.source import glance
from distsbi.store.status import count_reasons

FIRST_ROWS = 100  # rows of which one at least must have the right number of values


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs to know. Plain values.

    Args:
        run: the run directory.
        source: the catalog.
        glance: what `distsbi.store.source.glance` gave of it where it was checked.
        out: the output folder.
        nsamples: draws per row.
        seed: the words of the seed key, or an integer seed.
        options: keywords of `Posterior.draw` that were given.
        output: what is kept of the draws.
        loader: "module:function" that makes a posterior of `run`.
        network: "module:function" that makes a user's own network, for the loader.
        versions: of the packages where the job is made, which its workers must have too.
    """

    run: str
    source: SourceSpec
    glance: str
    out: str
    nsamples: int
    seed: int | tuple[int, int]
    options: dict[str, Any]
    output: Output
    loader: str = "distsbi.sampling:load"
    network: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=bit_versions)


class Worker:
    """Runs in the driver or as a Ray actor."""

    def __init__(self, job: Job):
        self.job = job

    def ready(self, own_process: bool = False) -> dict[str, Any]:
        """Loads, compiles, and tells what defines the draws: the same on every worker, or it is not the same run.

        `own_process`: the process is this worker's alone, so its environment and jax's settings are ours to choose.

        Raises ValueError for a run, catalog or option that cannot be used, for a catalog that is not the one that was
        checked, for GPUs that jax does not find, and for other versions than the job's; what compiling raises, such as that of a device that is full.
        """
        if own_process:
            own_jax()
            check_gpus()
        self.versions = bit_versions()
        if self.versions != self.job.versions:
            here = ", ".join(f"{name} {version}" for name, version in self.versions.items())
            there = ", ".join(f"{name} {version}" for name, version in self.job.versions.items())
            raise ValueError(
                f"the worker on {socket.gethostname()} has {here}, and the call was made with {there}: other versions draw other "
                "bits. Install the same everywhere."
            )
        from distsbi import keys
        from distsbi.sampling import SampleOptions, SolveError

        job = self.job
        module, name = job.loader.split(":")
        own = {} if job.network is None else {"network": job.network}
        self.posterior = getattr(importlib.import_module(module), name)(job.run, **own)
        self.source = open_source(job.source)
        if glance(job.source) != job.glance:
            raise ValueError(
                f"on {socket.gethostname()} {as_place(job.source.path)} is not the catalog that was checked: another copy, or "
                "changed since; give a path that all machines share, or the same copy everywhere, and leave it alone "
                "while it is sampled."
            )
        if self.posterior.is_unconditional:
            raise ValueError(
                f"{job.run} is a density without conditions, which no observation changes: draw from it with sample(key, nsamples) or sample_dataset."
            )
        self._check_columns()
        self._check_head()
        self.key = keys.as_key(job.seed) if isinstance(job.seed, int) else keys.from_words(job.seed)
        options = SampleOptions.parse(job.options)
        solver = options.make_solver(self.posterior.method, self.posterior.default_solver)
        tile = options.make_tile(self.posterior.tile).for_draws(job.nsamples, self.posterior.most_slots)
        p = self.posterior
        with contextlib.suppress(SolveError):  # compiles; the middle may be no x that a solver converges on
            self._draw(p.central_x[None], np.zeros(1, np.uint64), min(job.nsamples, p.tile.draws))
        self.device = device_name(next(iter(p.mesh.devices.flat)))
        return {
            "definition": {
                "posterior": p.fingerprint,
                "seed": list(keys.key_words(self.key)),
                "solver": solver.to_dict(),
                "tile": [tile.slots, tile.draws],
                **({"channels": "a column each"} if self._by_channel else {}),
            },
            "sizes": [p.dim_theta, p.ch_theta],
            "parameter_names": list(p.parameter_names),
            "worker": who(own_process, self.device),
        }

    def begin(self, shards: Shards) -> None:
        """Comes before the first shard, once the folder is known to be this run's."""
        p = self.posterior
        self.shards = shards
        self.format = Format(
            self.source.id_type,
            tuple(p.parameter_names),
            p.ch_theta,
            self.job.nsamples,
            self.job.output,
            shards.fingerprint,
        )

    def do(self, task: Task) -> dict[str, Any]:
        """Samples the rows of a shard, writes its file and returns its manifest row; or samples the rows of a probe and
        forgets them: whether that kills or hangs this process is the answer.

        Raises OSError if the file cannot be written.
        """
        began, number, skip = time.monotonic(), task.shard, dict(task.skip)
        if task.rows is not None:
            self.sample(range(*task.rows), skip)
            return {}
        rows = self.shards.rows(number)
        table = self.sample(rows, skip)
        content = self.format.encode(table)
        layout.shard_file(as_place(self.job.out), number, self.shards.count).write(content)
        return {
            "shard": number,
            "rows": len(rows),
            **schema.count_rows(table),
            "reasons": count_reasons(table),
            "bytes": content.size,
            "sha256": hashlib.sha256(content).hexdigest(),
            "seconds": round(time.monotonic() - began, 4),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self.device,
            "versions": self.versions,
        }

    def sample(self, rows: Sequence[int], skip: Mapping[int, str]) -> pa.Table:
        """The finished rows, as a shard holds them. `rows`: ascending."""
        parts = [self.source.read(start, stop) for start, stop in _ranges(rows)]
        ids, values = pa.concat_arrays([ids for ids, _ in parts]), [x for _, some in parts for x in some]
        if self.job.source.id_column is None:
            observation_ids = np.asarray(rows, np.uint64)
        else:
            from distsbi.keys import hash_id

            observation_ids = np.asarray([hash_id(value) for value in ids.to_pylist()], np.uint64)
        checked = [self._check(value) for value in values]
        status = [schema.INVALID if isinstance(x, str) else schema.OK for x in checked]
        message = [x if isinstance(x, str) else None for x in checked]
        for i, row in enumerate(rows):
            if row in skip:
                status[i], message[i] = schema.QUARANTINED, skip[row]
        draws = self._draw_rows(checked, observation_ids, status, message)
        return self.format.table(ids, np.asarray(rows), observation_ids, status, message, draws)

    def _check_columns(self) -> None:
        """Raises ValueError where columns are called as the instruments, in another order than these are packed in: a driver that cannot see the run."""
        names, columns = self.posterior.layout.names, self.job.source.x_columns
        if columns is not None and set(columns) == set(names) and columns != names:
            raise ValueError(
                f"x_columns must be in the order of the instruments, {', '.join(names)}; got {', '.join(columns)}."
            )

    def _check_head(self) -> None:
        """Raises ValueError where none of the first FIRST_ROWS rows has as many values as an observation: the column is another."""
        p = self.posterior
        rows = self.source.read(0, min(FIRST_ROWS, self.source.n_rows))[1]
        values = [row for row in rows if not isinstance(row, str)]
        size = p.dim_x * p.ch_x
        if values and all(value.ndim == 1 and value.size != size for value in values):
            short = all(value.size < size for value in values)
            fill = " If what is left of them is missing, fill it up with NaN." if p.missing and short else ""
            raise ValueError(
                f"none of the first {len(rows)} rows of {as_place(self.job.source.path)} has an x that this posterior takes: the first has {values[0].size} "
                f"values in {', '.join(self.job.source.columns)}, and {size} are needed (dim_x {p.dim_x}, ch_x {p.ch_x}). Name the "
                f"right column by x_column, or by x_columns those that make up x.{fill}"
            )
        arranged = [self._arranged(value) for value in values]
        if arranged and all(isinstance(x, str) for x in arranged):
            raise ValueError(
                f"none of the first {len(rows)} rows of {as_place(self.job.source.path)} can be read: {arranged[0]}."
            )

    @functools.cached_property  # asked of every row
    def _by_channel(self) -> bool:
        """Whether the catalog has a column for each channel, of several."""
        layout, columns = self.posterior.layout, self.job.source.x_columns
        return (
            layout.names == ("",)
            and 1 < layout.shapes[0][-1] == len(columns or ())
            and math.prod(layout.shapes[0][:-1]) > 1
        )

    def _arranged(self, value: np.ndarray) -> Row:
        """x in a shape that `check_x` takes, or why there is none. Values on one axis are x[0], x[1], ..., each with all its channels."""
        p, size = self.posterior, self.posterior.dim_x * self.posterior.ch_x
        if self._by_channel:
            columns = ", ".join(self.job.source.columns)
            channels, shape = p.layout.shapes[0][-1], p.layout.shapes[0][:-1]
            if value.shape != (channels, math.prod(shape)):
                return f"{columns} are one for each channel, so that each needs {math.prod(shape)} values"
            if shape == (channels,):
                return f"{columns} may be one for each channel or one for each entry, {channels} of both; store x as one column of tensors {list(p.layout.shapes[0])}"
            return np.moveaxis(value.reshape(channels, *shape), 0, -1)
        if value.ndim == 2 and len(self.job.source.x_columns or ()) > 1:
            value = value.ravel()
        if value.ndim > 1:
            return value
        if value.size != size:
            return f"x has {value.size} values; this posterior takes {size} (dim_x {p.dim_x}, ch_x {p.ch_x})"
        return value.reshape(p.dim_x, p.ch_x)

    def _check(self, value: Row) -> Row:
        """x of shape (dim_x, ch_x), or why there is none."""
        arranged = value if isinstance(value, str) else self._arranged(value)
        if isinstance(arranged, str):
            return arranged
        try:
            return self.posterior.check_x(arranged)
        except ValueError as error:  # a null came as NaN
            return str(error).replace("NaN", "NaN (or null)", 1) if np.isnan(arranged).any() else str(error)

    def _draw_rows(
        self, xs: Sequence[Row], ids: np.ndarray, status: list[str], message: list[str | None]
    ) -> np.ndarray:
        """Draws of the rows that are "ok", in their order; a row whose sampling raises becomes "failed", alone.

        Rows that raise together are halved until the guilty are alone: 2 log2(n) calls for one among n.
        """
        p, n = self.posterior, self.job.nsamples

        def draw(some: list[int]) -> list[np.ndarray]:
            try:
                return [self._draw(np.stack([xs[i] for i in some]), ids[some], n)]  # type: ignore[arg-type]
            except Exception as error:
                if len(some) > 1:
                    half = len(some) // 2
                    return draw(some[:half]) + draw(some[half:])
                if (fault := machines_fault(error)) is not None:
                    raise MachinesFault(fault) from error
                status[some[0]], message[some[0]] = schema.FAILED, f"{type(error).__name__}: {error}"[:1000]
                return []

        good = [i for i, s in enumerate(status) if s == schema.OK]
        parts = draw(good) if good else []
        good = [i for i in good if status[i] == schema.OK]
        if good:
            for i, sentence in p.far(np.stack([xs[i] for i in good])).items():  # type: ignore[arg-type]
                message[good[i]] = f"x {sentence}"
        return np.concatenate(parts) if parts else np.empty((0, n, p.dim_theta, p.ch_theta), np.float32)

    def _draw(self, xs: np.ndarray, ids: np.ndarray, nsamples: int) -> np.ndarray:
        return self.posterior.draw(self.key, xs, nsamples, observation_ids=ids, show_progress=False, **self.job.options)


def unlike(first: Mapping[str, Any], told: Mapping[str, Any], run: str) -> str:
    """Why two workers, by what they told when they came up, cannot draw one catalog."""
    here, there = first["worker"], told["worker"]
    one, other = first["definition"], told["definition"]
    if {**one, "tile": None} == {**other, "tile": None}:
        return (
            f"the worker on {there['host']} ({there['device']}) draws in tiles of {other['tile']}, the one on {here['host']} "
            f"({here['device']}) in tiles of {one['tile']}: a catalog is drawn on one kind of device. Give workers of one kind."
        )
    return (
        f"the worker on {there['host']} found another posterior at {run} than the one on {here['host']}; give a run "
        "directory that all machines share, or the same copy everywhere."
    )


def _ranges(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (start, stop)."""
    cuts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
    return [(rows[a], rows[b - 1] + 1) for a, b in itertools.pairwise(cuts)]


def who(own_process: bool, device: str) -> dict[str, Any]:
    """What a worker tells of itself, for the pool and for run.json."""
    node = _node() if own_process else ""
    return {"host": socket.gethostname(), "pid": os.getpid(), "node": node, "device": device}


def _node() -> str:
    """Ray's name of this machine."""
    import ray

    return ray.get_runtime_context().get_node_id()


def own_jax() -> None:
    """Settings of jax in a process that is a worker's alone. Before jax is imported."""
    if "XLA_CLIENT_MEM_FRACTION" in os.environ:  # jax refuses to have both names
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    use_compile_cache()


def check_gpus() -> None:
    """Raises ValueError if Ray gave this process GPUs and jax finds none: it would hold them, and draw in a CPU's tiles. JAX_PLATFORMS=cpu in
    the environment of a machine of the cluster says that it is to; that of a driver does not come here."""
    import jax

    if _gpus() and os.environ.get("JAX_PLATFORMS") != "cpu" and jax.default_backend() == "cpu":
        raise ValueError(
            f"the worker on {socket.gethostname()} was given a GPU, but jax finds none there: install jax with its extra for it, such as "
            "jax[cuda13], and look at the driver (nvidia-smi); or draw without num_gpus_per_worker."
        )


def _gpus() -> list[str]:
    """Ray's names of the GPUs that this process was given."""
    import ray

    return ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
