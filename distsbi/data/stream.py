"""Pairs of a folder that need not fit in memory: shuffled batches, from any position on.

    row groups of all files ──► permuted ──► windows of them, read ahead by a thread ──► rows of a window permuted ──► batches

The order depends on (seed, epoch) and the size of the windows alone, so the position (epoch, batch) is all the state: to resume at it reads the
one window that it lies in. Three windows are in memory at most: one that batches are cut from, one that is read, one that waits.

Several processes that train together stream the same batches, and each takes its part of every one: `part=(index, count)`.
"""

import dataclasses
import itertools
import math
import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from jaxtyping import Float, Int

from distsbi.data.pairs import PairsFolder, check_finite, open_pairs
from distsbi.data.parquet import read_file, row_groups

BUFFER_BYTES = 384 * 2**20  # of pairs in memory at a time
SAMPLED_GROUPS = 256  # row groups that a sample of a whole folder is read from

T = TypeVar("T")
Batch = tuple[Float[np.ndarray, "batch dim_theta ch_theta"], Float[np.ndarray, "batch *dim_x ch_x"]]


@dataclasses.dataclass(frozen=True)
class StreamedPairs(os.PathLike[str]):
    """A folder of pairs as a data set that is streamed, however small it is: `Pipeline(StreamedPairs("pairs"), None, ...)`.

    Args:
        path: the folder.
        buffer_bytes: of pairs in memory at a time; what is larger is shuffled within windows of a third of it.
        seed: of the order.
    """

    path: str | os.PathLike[str]
    buffer_bytes: int = BUFFER_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.buffer_bytes < 1:
            raise ValueError(f"buffer_bytes must be positive; got {self.buffer_bytes}.")

    def __fspath__(self) -> str:
        return os.fspath(self.path)


class Group(NamedTuple):
    """A row group of a file."""

    file: Path
    index: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Groups:
    """Some row groups of a folder. Its length is that of their rows."""

    groups: tuple[Group, ...]
    theta_shape: tuple[int, int]
    x_shape: tuple[int, ...]

    @classmethod
    def of(cls, folder: PairsFolder) -> Self:
        """All of them. Raises ValueError for a damaged file, OSError for one that cannot be read now."""
        groups = (Group(file, i, rows) for file in folder.files for i, rows in enumerate(row_groups(file)) if rows)
        return cls(tuple(groups), folder.theta_shape, folder.x_shape)

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def row_bytes(self) -> int:
        return 4 * (math.prod(self.theta_shape) + math.prod(self.x_shape))

    def hold_out(self, fraction: float) -> tuple["Groups", "Groups"]:
        """(the rest, those held out), which are evenly spaced. Raises ValueError for a single group."""
        n = len(self.groups)
        if n < 2:
            raise ValueError(
                f"{self.groups[0].file} is one row group, too little to hold some out: give val_dataset, or write it with "
                f"distsbi.data.write_pairs."
            )
        count = min(n - 1, max(1, round(fraction * n)))
        held = set(np.linspace(0, n - 1, count).round().astype(int).tolist())
        parts = ([g for i, g in enumerate(self.groups) if (i in held) == inside] for inside in (False, True))
        rest, out = (dataclasses.replace(self, groups=tuple(part)) for part in parts)
        return rest, out

    def read(self, group: Group, missing: bool = False) -> Batch:
        """One of them, checked. Raises ValueError for a damaged file, NaN and inf, OSError if it cannot be read now."""
        theta, x = read_file(group.file, self.theta_shape, self.x_shape, group=group.index)
        try:
            check_finite(theta, x, missing=missing)
        except ValueError as error:
            raise ValueError(f"{group.file}, row group {group.index}: {error}") from error
        return theta, x

    def sample(self, rows: int, missing: bool = False) -> Batch:
        """About so many rows, at most, evenly spaced over all: one pass, with one group in memory at a time."""
        chosen = self.groups
        if len(chosen) > SAMPLED_GROUPS:
            chosen = tuple(chosen[i] for i in np.linspace(0, len(chosen) - 1, SAMPLED_GROUPS).round().astype(int))
        total = sum(group.rows for group in chosen)
        wanted = np.linspace(0, total, min(rows, total), endpoint=False).astype(np.int64)
        parts, start = [], 0
        for group in chosen:
            index = wanted[(wanted >= start) & (wanted < start + group.rows)] - start
            if index.size:
                theta, x = self.read(group, missing)
                parts.append((theta[index], x[index]))
            start += group.rows
        thetas, xs = zip(*parts, strict=True)
        return np.concatenate(thetas), np.concatenate(xs)


def iter_pairs(
    path: str | os.PathLike[str] | PairsFolder,
    batch_size: int,
    *,
    seed: int,
    epoch: int = 0,
    batch: int = 0,
    buffer_bytes: int = BUFFER_BYTES,
    missing: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """The shuffled batches of one epoch, from number `batch` on; see the module's page.

    Rows short of a last full batch are left out; they differ from epoch to epoch. `part`: (index, count), this process's share of every batch.

    Raises ValueError as `open_pairs` does, and if the folder has fewer rows than one batch.
    """
    groups = Groups.of(path if isinstance(path, PairsFolder) else open_pairs(path))
    check(groups, batch_size, part)
    windows = _windows(groups, batch_size, seed, epoch, batch, buffer_bytes, missing)
    return _cut(ahead(windows), batch_size, part)


def endless(
    groups: Groups,
    batch_size: int,
    *,
    seed: int,
    step: int = 0,
    buffer_bytes: int = BUFFER_BYTES,
    missing: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """The batches of all epochs, one after the other, from number `step` on. Arguments and errors as for `iter_pairs`."""
    check(groups, batch_size, part)
    first, batch = divmod(step, len(groups) // batch_size)

    def windows() -> Iterator[_Window]:
        for epoch in itertools.count(first):
            yield from _windows(groups, batch_size, seed, epoch, batch if epoch == first else 0, buffer_bytes, missing)

    return _cut(ahead(windows()), batch_size, part)


def check(groups: Groups, batch_size: int, part: tuple[int, int]) -> None:
    """Raises ValueError for a batch that is larger than the set, or that cannot be divided among so many processes."""
    index, count = part
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"batch_size={batch_size} cannot be divided into {count} parts of which this is number {index}."
        )
    if len(groups) < batch_size:
        where = f"of {groups.groups[0].file.parent}" if groups.groups else ""
        raise ValueError(
            f"batch_size={batch_size} is more than the {len(groups)} pairs {where}; give a smaller batch_size."
        )


class _Window(NamedTuple):
    """Rows in memory, and the order in which they come."""

    theta: np.ndarray
    x: np.ndarray
    order: Int[np.ndarray, " rows"]


def _windows(
    groups: Groups, batch_size: int, seed: int, epoch: int, batch: int, buffer_bytes: int, missing: bool
) -> Iterator[_Window]:
    """The windows of an epoch from a batch on, each with the rows of it that are in full batches and not before that."""
    most = max(1, buffer_bytes // (3 * groups.row_bytes))
    order = np.random.default_rng([seed, epoch]).permutation(len(groups.groups))
    position, last = batch * batch_size, len(groups) // batch_size * batch_size
    start = number = 0
    while number < len(order):
        begun, members = number, [groups.groups[order[number]]]
        number += 1
        while number < len(order) and sum(g.rows for g in members) + groups.groups[order[number]].rows <= most:
            members.append(groups.groups[order[number]])
            number += 1
        rows = sum(group.rows for group in members)
        if position < start + rows and start < last:
            shuffle = np.random.default_rng([seed, epoch, begun]).permutation(rows)
            here = shuffle[max(position - start, 0) : last - start]
            yield _Window(*_read(groups, members, rows, missing), here)
        start += rows


def _read(groups: Groups, members: list[Group], rows: int, missing: bool) -> Batch:
    theta = np.empty((rows, *groups.theta_shape), np.float32)
    x = np.empty((rows, *groups.x_shape), np.float32)
    start = 0
    for group in members:
        theta[start : start + group.rows], x[start : start + group.rows] = groups.read(group, missing)
        start += group.rows
    return theta, x


def _cut(windows: Iterable[_Window], batch_size: int, part: tuple[int, int]) -> Generator[Batch, None, None]:
    """Batches across windows, of each this process's part."""
    index, count = part
    low, high = batch_size * index // count, batch_size * (index + 1) // count
    parts: list[Batch] = []
    filled = 0  # rows of the batch at work
    for theta, x, order in windows:
        at = 0
        while at < len(order):
            some = order[at : at + batch_size - filled]
            own = some[max(low - filled, 0) : max(high - filled, 0)]
            if own.size:
                parts.append((theta[own], x[own]))
            at, filled = at + len(some), filled + len(some)
            if filled == batch_size:
                thetas, xs = zip(*parts, strict=True)
                yield (thetas[0], xs[0]) if len(parts) == 1 else (np.concatenate(thetas), np.concatenate(xs))
                parts, filled = [], 0


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The same items, made by a thread, of which `depth` wait. It ends with the iterator, also where that is dropped before its end."""
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    ended = threading.Event()

    def put(item: Any, error: BaseException | None) -> bool:
        while not ended.is_set():
            try:
                made.put((item, error), timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
                del item  # it is the reader's now
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=run, daemon=True, name="distsbi-ahead")
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
            del item
    finally:
        ended.set()
        thread.join()
