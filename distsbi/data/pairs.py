"""Training pairs (theta, x): checked arrays, and folders of Parquet files for sets larger than memory.

A folder holds complete files `pairs-00000.parquet`, `pairs-00001.parquet`, ... (see `distsbi.data.parquet`).

    simulate_pairs / write_pairs / distsbi.simulate  ->  folder  ->  read_pairs (into memory) or iter_pairs (stream.py: shuffled, resumable)
"""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from distsbi.data.float32 import Columns, check_float32
from distsbi.data.parquet import read_file, read_footer, write_file
from distsbi.data.prior import check_names, default_names
from distsbi.files import one_holder

UNFINISHED = "_unfinished"  # is there while a folder is being simulated or written
LOCK = "_lock"  # of the one call of `simulate_pairs` that writes there
_STALE_SECONDS = 3600
_SIMULATIONS = "_distsbi/run.json"  # of `distsbi.simulate`, whose files are named as in distsbi.store.layout
_SHARD = re.compile(r"shard-\d{8}-of-(\d{8})\.parquet")
_SHOWN = 5


class Pairs(NamedTuple):
    """float32 arrays of equal length, finite, with channel axes; `names` are those of the parameters."""

    theta: Float[np.ndarray, "n dim_theta ch_theta"]
    x: Float[np.ndarray, "n *dim_x ch_x"]
    names: tuple[str, ...]


def as_pairs(
    theta: Any, x: Any, names: Sequence[str] | None = None, *, missing: bool = False, whole: bool = True
) -> Pairs:
    """Checked pairs from two arrays of shape [n, dim] or [n, dim, ch], x also of images [n, rows, columns, ch]; without names the parameters are `theta_0`,
    `theta_1`, ... `missing`: NaN in x means that the entry is missing. `whole`: these are all pairs, no batch of them.

    Raises ValueError for other shapes, mismatched or zero lengths, entries that are not real numbers, rows with NaN
    or inf, and columns that float32 cannot tell apart.
    """
    given = np.asarray(theta), np.asarray(x)
    theta, x = _with_channels("theta", theta), _with_channels("x", x)
    if len(theta) != len(x):
        raise ValueError(
            f"theta has {len(theta)} rows and x has {len(x)}; row i of x must be simulated from row i of theta."
        )
    if not len(theta):
        raise ValueError("theta and x have no rows; give at least one pair.")
    check_finite(theta, x, missing=missing)
    if whole:
        check_float32("theta", given[0])
        check_float32("x", given[1], constants=True)
    dim = theta.shape[1]
    return Pairs(theta, x, check_names(names, dim) if names is not None else default_names(dim))


def check_finite(theta: np.ndarray, x: np.ndarray, *, missing: bool = False) -> None:
    """Raises ValueError, naming counts and first rows, if a row of either array holds NaN or inf; `missing`: NaN may be in x."""
    for name, array in (("theta", theta), ("x", x)):
        good = np.isfinite(array) | (np.isnan(array) if missing and name == "x" else False)
        bad = np.flatnonzero(~good.reshape(len(array), -1).all(axis=1))
        if bad.size:
            raise ValueError(
                f"{name} has NaN or inf (as float32) in {bad.size} of {len(array)} rows (first: "
                f"{', '.join(map(str, bad[:_SHOWN]))}). "
                f"Drop them, as in keep = np.isfinite({name}).reshape(len({name}), -1).all(1); theta, x = theta[keep], "
                f"x[keep], or mend the simulator"
                f"{'; entries of x that are missing may be NaN with missing=True (MLP and Flux1 take it)' if name == 'x' and not missing else ''}."
            )


def _with_channels(name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name} must hold real numbers; got dtype {array.dtype}.")
    if (array.ndim not in (2, 3) and not (name == "x" and array.ndim > 3)) or 0 in array.shape[1:]:
        advice = f" Add the axis with {name}[:, None]." if array.ndim == 1 else ""
        raise ValueError(f"{name} must have shape [n, dim] or [n, dim, channels]; got {list(array.shape)}.{advice}")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which check_finite reports
        array = array.astype(np.float32, copy=False)
    return array if array.ndim > 2 else array[..., None]


# Folders


@dataclass(frozen=True)
class PairsFolder:
    """What a folder's footers say; nothing of the data is read."""

    files: tuple[Path, ...]
    rows: tuple[int, ...]
    names: tuple[str, ...]
    theta_shape: tuple[int, int]
    x_shape: tuple[int, ...]
    source: dict[str, Any]

    def __len__(self) -> int:
        return sum(self.rows)

    @property
    def missing(self) -> bool:
        """Whether they were written as pairs in which NaN in x is an entry that is missing."""
        return self.source.get("missing") is True


def write_pairs(
    path: str | os.PathLike[str],
    theta: Any,
    x: Any,
    *,
    names: Sequence[str] | None = None,
    rows_per_file: int = 65_536,
    source: dict[str, Any] | None = None,
    missing: bool = False,
) -> PairsFolder:
    """Write checked pairs to an empty or new folder; where it was cut off, the same call finishes it. `source` is any JSON-able note on
    where they came from; training takes `{"prior": {"mass": "LogNormal(0, 0.5)", ...}}` from it. `missing`: NaN in x means that the entry is missing, as
    it then does in training too.

    Raises ValueError for bad pairs (see `as_pairs`), for a folder that holds pairs already, and for one whose pairs so far are others.
    """
    pairs, folder = as_pairs(theta, x, names, missing=missing), Path(path)
    _require_positive(rows_per_file=rows_per_file)
    noted = {**(source or {}), **({"missing": True} if missing else {})}
    n, note = len(pairs.theta), json.loads(json.dumps(noted))  # as it is read back
    starts = range(0, n, rows_per_file)
    parts = {
        _file_name(shard): (pairs.theta[at : at + rows_per_file], pairs.x[at : at + rows_per_file], pairs.names, note)
        for shard, at in enumerate(starts)
    }
    done = {file.name for file in _files(folder)} if folder.exists() else set()
    if done and not (folder / UNFINISHED).exists():
        raise ValueError(f"{folder} holds pairs already; give a new folder, or remove it first.")
    if done and (_marked(folder) != f"{n}" or not all(f in parts and _holds(folder / f, *parts[f]) for f in done)):
        raise ValueError(
            f"{folder} was cut off while other pairs were written than these, or with another rows_per_file; give a new folder, or "
            f"remove it first."
        )
    _begin(folder, n)
    for name, part in parts.items():
        if name not in done:
            write_file(folder / name, *part)
    mark_finished(folder)
    return open_pairs(folder)


def open_pairs(path: str | os.PathLike[str]) -> PairsFolder:
    """Read and compare the footers of a folder of Parquet files, in the order of their names.

    Raises ValueError if there are none, if one is damaged or has no theta and x columns, if they disagree on shapes or names, or if some are
    no shards beside the shards of `distsbi.simulate`; OSError if one cannot be read now.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pairs; make one with write_pairs or `distsbi simulate`.")
    files = _files(folder)
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"the writing of {folder} was cut off before its {_marked(folder)} pairs; give the same command again "
            f"to finish it, or remove {folder / UNFINISHED} to do with the pairs that are there."
        )
    if not files:
        raise ValueError(f"{folder} holds no Parquet file; make pairs with write_pairs or `distsbi simulate`.")
    _refuse_strays(folder, files)
    footers = [read_footer(file) for file in files]
    first = footers[0]
    for file, footer in zip(files, footers, strict=True):
        if footer[1:4] != first[1:4]:
            raise ValueError(
                f"{file} does not belong with {files[0]}: (names, theta shape, x shape) {footer[1:4]} against "
                f"{first[1:4]}."
            )
    rows = {file: footer.rows for file, footer in zip(files, footers, strict=True) if footer.rows}
    if not rows:
        raise ValueError(f"{folder} holds no pairs: its files have no rows. Make others with `distsbi simulate`.")
    return PairsFolder(tuple(rows), tuple(rows.values()), *first[1:])


def _refuse_strays(folder: Path, files: list[Path]) -> None:
    """Raises ValueError for a folder of `distsbi.simulate` with files that are not named as its shards, such as a copy of one. How many shards it
    has, most of the names say."""
    if not (folder / _SIMULATIONS).exists():
        return
    found = [_SHARD.fullmatch(file.name) for file in files]
    shards = Counter(shard[1] for shard in found if shard).most_common(1)
    own = shards[0][0] if shards else ""
    other = [file.name for file, shard in zip(files, found, strict=True) if not shard or shard[1] != own]
    if other:
        raise ValueError(
            f"{folder} holds files that are no shards of its simulations, such as {other[0]}, and would be read with them; move them "
            f"elsewhere (distsbi verify {folder} names all)."
        )


def read_pairs(path: str | os.PathLike[str] | PairsFolder, *, missing: bool | None = None) -> Pairs:
    """A whole folder in memory, checked. `missing`: NaN in x means that the entry is missing; None: where the folder says so.
    Raises ValueError as `open_pairs` and `as_pairs` do."""
    folder = path if isinstance(path, PairsFolder) else open_pairs(path)
    missing = folder.missing if missing is None else missing
    theta = np.empty((len(folder), *folder.theta_shape), np.float32)
    x = np.empty((len(folder), *folder.x_shape), np.float32)
    start, columns = 0, {"theta": Columns(), "x": Columns()}
    for file, rows in zip(folder.files, folder.rows, strict=True):
        theta[start : start + rows], x[start : start + rows] = _read(file, folder, missing, columns)
        start += rows
    for name, found in columns.items():
        found.check(f"{folder.files[0].parent}: {name}" if folder.files else name, constants=name == "x")
    return Pairs(theta, x, folder.names)


def simulate_pairs(
    task: Any,
    key: Any,
    n: int,
    path: str | os.PathLike[str],
    *,
    batch: int = 8_192,
    rows_per_file: int = 65_536,
    progress: bool | None = None,
) -> PairsFolder:
    """Draw n pairs of a `Task` on the devices into a folder. Complete files are kept: a killed run goes on, a larger n
    extends the pairs. `progress`: a bar; None: on a terminal.

    Pair i depends on (key, i, batch, rows_per_file) alone. The simulator is always called on `batch` rows, and compiled
    once.

    Raises ValueError if the folder holds pairs of another task, key, batch or rows_per_file, or more than n of them, if another call writes
    there, or if the simulator gives NaN or inf; files written before stay.
    """
    import jax
    from tqdm import tqdm

    from distsbi.keys import as_key, key_words

    _require_positive(n=n, batch=batch, rows_per_file=rows_per_file)
    key, folder = as_key(key), Path(path)
    source = {"task": task.name, "seed": list(key_words(key)), "batch": batch, "rows_per_file": rows_per_file}
    _rows_done(folder, source, n)  # before the lock, which leaves a file
    draw = jax.jit(lambda k: task.pairs(k, batch))
    hidden = None if progress is None else not progress
    folder.mkdir(parents=True, exist_ok=True)
    with (
        one_holder(folder / LOCK, folder),
        tqdm(total=n, desc=f"simulating {task.name}", unit=" pairs", unit_scale=True, disable=hidden) as bar,
    ):
        done = _rows_done(folder, source, n)
        _begin(folder, n)
        for shard, start in enumerate(range(0, n, rows_per_file)):
            rows = min(rows_per_file, n - start)
            if done.get(_file_name(shard)) != rows:
                shard_key = jax.random.fold_in(key, shard)
                chunks = [jax.device_get(draw(jax.random.fold_in(shard_key, i))) for i in range(-(-rows // batch))]
                theta, x = (np.concatenate(column)[:rows] for column in zip(*chunks, strict=True))
                write_file(folder / _file_name(shard), *as_pairs(theta, x, task.parameter_names), source)
            bar.update(rows)
        mark_finished(folder)
    return open_pairs(folder)


def _begin(folder: Path, n: int) -> None:
    """Makes the folder, marks it as unfinished until it holds n pairs, and removes what a killed writer left."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(".pairs-*.parquet.*"):
        if time.time() - file.stat().st_mtime > _STALE_SECONDS:
            file.unlink(missing_ok=True)
    mark_unfinished(folder, n)


def mark_unfinished(folder: Path, n: int) -> None:
    """Until `mark_finished`, `open_pairs` says that the n pairs are not there yet."""
    if not (folder / UNFINISHED).exists() or _marked(folder) != f"{n}":
        (folder / UNFINISHED).write_text(f"{n}\n")


def mark_finished(folder: Path) -> None:
    (folder / UNFINISHED).unlink(missing_ok=True)


def _marked(folder: Path) -> str:
    """How many pairs an unfinished folder is to hold."""
    return (folder / UNFINISHED).read_text().strip()


def _holds(path: Path, theta: np.ndarray, x: np.ndarray, names: tuple[str, ...], source: dict[str, Any]) -> bool:
    """Whether a file is the one that `write_file` makes of these."""
    footer = read_footer(path)
    if footer != (len(theta), names, theta.shape[1:], x.shape[1:], source):
        return False
    found = read_file(path, footer.theta_shape, footer.x_shape)
    return np.array_equal(found[0], theta) and np.array_equal(found[1], x, equal_nan=True)


def _read(
    path: Path, folder: PairsFolder, missing: bool, columns: dict[str, Columns] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    theta, x = read_file(path, folder.theta_shape, folder.x_shape, columns=columns)
    try:
        check_finite(theta, x, missing=missing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return theta, x


def _rows_done(folder: Path, source: dict[str, Any], n: int) -> dict[str, int]:
    """Rows of each complete file of this very simulation."""
    if not folder.exists() or not _files(folder):
        return {}
    done = {}
    for file in _files(folder):
        footer = read_footer(file)
        found = footer.source
        if found != source:
            raise ValueError(
                f"{file} was not made by this simulation: it holds {found}, asked for is {source}. Give another folder."
            )
        done[file.name] = footer.rows
    if sum(done.values()) > n:
        raise ValueError(
            f"{folder} holds {sum(done.values())} pairs, more than the {n} asked for. Ask for as many, or give another "
            "folder."
        )
    return done


# Names


def _file_name(shard: int) -> str:
    return f"pairs-{shard:05d}.parquet"


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder.")
    return sorted(file for file in folder.glob("*.parquet") if not file.name.startswith((".", "_")))


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
