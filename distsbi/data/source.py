"""FROM what a run learns: one shape for every form of training data.

arrays (theta, x)     on the devices, shuffled and indexed inside the training step
Task                  simulated on the devices inside the step: no finite set at all
Parquet folder        read into arrays where it fits (IN_MEMORY_BYTES), else streamed in shuffled row groups; `StreamedPairs(folder)` always is
iterable of batches   streamed, cut and joined to the batch size; anything that yields (theta, x), grain included
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from distsbi.data.float32 import check_float32
from distsbi.data.pairs import as_pairs, open_pairs, read_pairs
from distsbi.data.prior import check_theta
from distsbi.data.stream import Groups, StreamedPairs, endless
from distsbi.networks.observation import Layout
from distsbi.tasks.base import Task

IN_MEMORY_BYTES = 2 * 2**30
FIT_PAIRS = 50_000  # pairs that scales are fitted on where the set is not in memory
VALIDATION_PAIRS = 4_096  # and validated on
FRACTION = 0.05  # of a set that is held out to validate on
GROUPS_EACH = 4  # row groups, least, that a process which shares a stream has alone
FIT_BYTES = 256 * 2**20  # most of either, where rows are large

Pairs = tuple[Float[np.ndarray, "n dim_theta ch_theta"], Float[np.ndarray, "n dim_x ch_x"]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Training data.

    size: pairs in the set, or None where it is endless or unknown.
    arrays: the pairs, where they are in memory.
    draw: `draw(key, index [b], data) -> (theta, x)`, traceable; None where batches are streamed.
    batches: `batches(step, batch_size) -> iterator` over host batches of that size from update `step` on, for streams.
    fit: pairs to fit the scales on.
    fingerprint: a digest of the data, for resuming.
    hold_out: `hold_out(fraction) -> (source of the rest, validation pairs)`, where nothing was given to validate on; None: as suits it.
    part: `part(index, count) -> batches` of process `index` of `count`: its rows of every batch, which is made of those of all; None: every process
        reads all, and keeps its rows.
    """

    size: int | None
    fit: Callable[[], Pairs]
    fingerprint: str
    arrays: Pairs | None = None
    draw: Callable[[Array, Array, Any], tuple[Array, Array]] | None = None
    batches: Callable[[int, int], Iterator[Pairs]] | None = None
    hold_out: Callable[[float | None], tuple["Source", Pairs]] | None = None
    part: Callable[[int, int], Callable[[int, int], Iterator[Pairs]]] | None = None


class Shapes(NamedTuple):
    """(dim_theta, ch_theta), (dim_x, ch_x), whether NaN in x means that the entry is missing, and what an x looks like that is
    packed into (dim_x, ch_x)."""

    theta: tuple[int, int]
    x: tuple[int, int]
    missing: bool = False
    layout: Layout | None = None


def make_source(data: Any, shapes: Shapes, prior: Any = None) -> Source:
    """The source that `data` describes.

    Raises ValueError for mismatched lengths, wrong shapes, non-finite rows, theta outside the prior, or another type.
    """
    if isinstance(data, Task):
        return _from_task(data, shapes, prior)
    if isinstance(data, (str, os.PathLike)):
        return _from_folder(data, shapes, prior)
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(p, "shape") or isinstance(p, Mapping) for p in data):
        return _from_arrays(_checked(data, shapes, prior, whole=True))
    if isinstance(data, Iterable):
        return _from_iterable(data, shapes, prior)
    raise ValueError(
        f"a dataset must be arrays (theta, x), an iterable of such batches, a Parquet folder, a Task or None; got {type(data).__name__}."
    )


def _checked(data: Any, shapes: Shapes, prior: Any, *, whole: bool = False) -> Pairs:
    theta, x = data
    if shapes.layout is not None and not shapes.layout.is_plain:
        packed = shapes.layout.pack(x)
        for name, part in (x.items() if isinstance(x, Mapping) else (("x", x),)) if whole else ():
            check_float32(name, np.asarray(part), constants=True)  # packed they are float32
        x = packed
    found: list[tuple[int, ...]] = [tuple(getattr(part, "shape", ()))[1:] for part in (theta, x)]
    plain = [shape[:1] if shape[1:] in ((), (1,)) else shape for shape in found]
    if whole and shapes.theta[1] == shapes.x[1] == 1 and plain == [shapes.x[:1], shapes.theta[:1]] != plain[::-1]:
        raise ValueError(
            f"theta has {found[0][0]} columns and x {found[1][0]}, and this pipeline takes {shapes.theta[0]} and {shapes.x[0]}: give them the other "
            f"way round, (theta, x)."
        )
    theta, x, _ = as_pairs(theta, x, missing=shapes.missing, whole=whole)
    for name, array, shape in (("theta", theta, shapes[0]), ("x", x, shapes[1])):
        if array.shape[1:] != shape:
            raise ValueError(
                f"{name} must have shape (n, {shape[0]}, {shape[1]}) for this pipeline; got {array.shape}."
            )
    if prior is not None:
        check_theta(prior, theta)
    return theta, x


def take(key: Array, index: Array, data: Any) -> tuple[Array, Array]:
    """Rows of device-resident arrays."""
    return data[0][index], data[1][index]


def _from_arrays(pairs: Pairs) -> Source:
    digest = hashlib.sha256()
    for array in pairs:
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())

    def split(fraction: float | None) -> tuple[Source, Pairs]:
        kept, held = hold_out(pairs, fraction)
        return _from_arrays(kept), held

    return Source(
        size=len(pairs[0]), fit=lambda: pairs, fingerprint=digest.hexdigest(), arrays=pairs, draw=take, hold_out=split
    )


def _from_task(task: Task, shapes: Shapes, prior: Any = None) -> Source:
    given = (task.dim_theta, 1), (task.dim_x, 1)
    if given != shapes[:2]:
        raise ValueError(
            f"task {task.name!r} has theta {given[0]} and x {given[1]}; this pipeline has {shapes[0]} and {shapes[1]}."
        )

    def some(seed: int, rows: int) -> Pairs:
        return _checked(
            jax.device_get(jax.jit(task.pairs, static_argnums=1)(jax.random.key(seed), rows)), shapes, prior
        )

    def fit() -> Pairs:
        return some(0, _most(FIT_PAIRS // 5, shapes))

    def split(fraction: float | None) -> tuple[Source, Pairs]:
        return source, some(1, _most(VALIDATION_PAIRS, shapes))

    source = Source(
        size=None,
        fit=fit,
        fingerprint=f"task:{task.name}",
        draw=lambda key, index, data: task.pairs(key, index.shape[0]),
        hold_out=split,
    )
    return source


def _from_folder(path: str | os.PathLike[str], shapes: Shapes, prior: Any) -> Source:
    folder = open_pairs(path)
    if isinstance(path, StreamedPairs):
        return _streamed(Groups.of(folder), shapes, prior, path)
    if len(folder) * sum(math.prod(shape) for shape in shapes[:2]) * 4 <= IN_MEMORY_BYTES:
        pairs = read_pairs(folder, missing=shapes.missing)
        return _from_arrays(_checked((pairs.theta, pairs.x), shapes, prior))
    return _streamed(Groups.of(folder), shapes, prior, StreamedPairs(path))


def _streamed(groups: Groups, shapes: Shapes, prior: Any, options: StreamedPairs) -> Source:
    def batches(step: int, batch_size: int) -> Iterator[Pairs]:
        return of(groups, step, batch_size, (0, 1))

    def part(index: int, count: int) -> Callable[[int, int], Iterator[Pairs]]:
        """Of the row groups that this process has alone, where each gets several; else its rows of batches that all of them read."""
        if len(groups.groups) < GROUPS_EACH * count:
            return lambda step, batch_size: of(groups, step, batch_size, (index, count))
        own = dataclasses.replace(groups, groups=groups.groups[index::count])
        return lambda step, batch_size: of(own, step, batch_size // count, (0, 1))

    def of(groups: Groups, step: int, batch_size: int, part: tuple[int, int]) -> Iterator[Pairs]:
        seed, size = options.seed, options.buffer_bytes
        found = endless(groups, batch_size, seed=seed, step=step, buffer_bytes=size, missing=shapes.missing, part=part)
        with contextlib.closing(found):  # its thread ends with this generator
            for batch in found:
                yield _checked(batch, shapes, prior)

    def some(rows: int) -> Pairs:
        return _checked(groups.sample(_most(rows, shapes), shapes.missing), shapes, prior)

    def split(fraction: float | None) -> tuple[Source, Pairs]:
        rest, held = groups.hold_out(FRACTION if fraction is None else fraction)
        found = _checked(held.sample(_most(VALIDATION_PAIRS, shapes), shapes.missing), shapes, prior)
        return _streamed(rest, shapes, prior, options), found

    files = dict.fromkeys(group.file for group in groups.groups)
    said = [(group.file.name, group.index, group.rows) for group in groups.groups]
    sizes = [(file.name, file.stat().st_size) for file in files]
    return Source(
        size=len(groups),
        fit=lambda: some(FIT_PAIRS),
        fingerprint=hashlib.sha256(repr((options.seed, options.buffer_bytes, sizes, said)).encode()).hexdigest(),
        batches=batches,
        hold_out=split,
        part=part,
    )


def _from_iterable(data: Iterable[Any], shapes: Shapes, prior: Any = None) -> Source:
    """Batches of any sizes, joined and cut to the batch size of the training: what is left over at the end of a pass begins the next.
    What can be iterated again starts again at its end; an iterator is used once, and training ends with it.

    The pairs that the scales are fitted on are kept and are the first to be trained on. Where no validation set is given, the
    first batches are held out of every pass, which needs a fixed order. A killed run resumes at the same row: to the same bits
    only if the iterable yields the same batches again.
    """
    once = iter(data) is data
    supply = iter(data)
    head: list[Pairs] = []
    held = 0  # batches at the start that are validated on, in every pass
    begun = False

    def checked(batch: Any) -> Pairs:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"every batch must be a pair (theta, x); got {type(batch).__name__}.")
        return _checked(batch, shapes, prior)

    def read_head() -> None:
        rows = 0
        for batch in supply if not head else ():
            head.append(checked(batch))
            rows += len(head[-1][0])
            if len(head) > 1 and rows >= _most(FIT_PAIRS // 10, shapes):
                break
        if not head:
            raise ValueError("the training iterable is empty.")

    def fit() -> Pairs:
        read_head()
        return _first(_joined(head[held:]), _most(FIT_PAIRS, shapes))

    def split(fraction: float | None) -> tuple[Source, Pairs]:
        nonlocal held
        read_head()
        if len(head) < 2:
            raise ValueError("one batch is too little to hold some out; give val_dataset, or smaller batches.")
        held = min(len(head) - 1, max(1, round((FRACTION if fraction is None else fraction) * len(head))))
        return source, _first(_joined(head[:held]), _most(VALIDATION_PAIRS, shapes))

    def again() -> Iterator[Pairs]:
        """A new pass, without the batches that are held out."""
        stream, empty = map(checked, data), True
        for number in range(held):
            found = next(stream, None)
            if found is None:
                break
            if not np.array_equal(found[0], head[number][0]):
                raise ValueError(
                    "the training iterable changes its order between passes, so that no batch can be held out of it: "
                    "give val_dataset."
                )
        for pairs in stream:
            empty = False
            yield pairs
        if empty:
            raise ValueError(
                "the training iterable yields nothing when it is iterated again; give one that starts anew, such as a list, or "
                "an iterator, which is used once."
            )

    def passes() -> Iterator[Pairs]:
        nonlocal begun
        if once or not begun:
            begun = True
            yield from head[held:]
            yield from map(checked, supply)
        while not once:
            yield from again()

    def batches(step: int, batch_size: int) -> Iterator[Pairs]:
        read_head()
        return itertools.islice(_cut(passes(), batch_size), step, None)

    source = Source(size=None, fit=fit, fingerprint="iterable", batches=batches, hold_out=split)
    return source


def _cut(stream: Iterable[Pairs], size: int) -> Iterator[Pairs]:
    """Batches of `size` rows from batches of any; rows short of the last one are left out."""
    parts: list[Pairs] = []
    needed = size
    for theta, x in stream:
        start = 0
        while start < len(theta):
            part = slice(start, start + needed)
            parts.append((theta[part], x[part]))
            start, needed = part.stop, needed - len(parts[-1][0])
            if not needed:
                yield _joined(parts)
                parts, needed = [], size


def _joined(batches: list[Pairs]) -> Pairs:
    if len(batches) == 1:
        return batches[0]
    return tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))  # type: ignore[return-value]


def _first(pairs: Pairs, rows: int) -> Pairs:
    return pairs[0][:rows], pairs[1][:rows]


def _most(rows: int, shapes: Shapes) -> int:
    """So many rows, or as many as FIT_BYTES hold."""
    return max(1, min(rows, FIT_BYTES // (4 * sum(math.prod(shape) for shape in shapes[:2]))))


def hold_out(pairs: Pairs, fraction: float | None) -> tuple[Pairs, Pairs]:
    """(training, validation): an evenly spaced share of the rows held out; None: 5 %, but enough to tell a loss by, and no more than that takes. Raises
    ValueError for fewer than 20 pairs."""
    n = len(pairs[0])
    if n < 20:
        raise ValueError(f"{n} pairs are too few to hold some out; give at least 20, or a validation set.")
    count = (
        min(n - 1, max(1, round(n * fraction)))
        if fraction is not None
        else min(max(round(n * FRACTION), min(100, n // 10)), 5_000)
    )
    held = np.zeros(n, bool)
    held[np.linspace(0, n - 1, count).round().astype(int)] = True
    theta, x = pairs
    return (theta[~held], x[~held]), (theta[held], x[held])
