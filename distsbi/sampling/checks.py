"""What is asked of a posterior, checked before anything is computed; and what a solve left unsolved or inexact, told after.

Every message names what was given, what was expected and what to do: of an array that lacks axes, the index that adds them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from distsbi import keys
from distsbi.data.standardise import Standardizer
from distsbi.hints import warn
from distsbi.sampling import tiles

BLOCK_ROWS = 4_096  # observations that are looked at together
CHECK_WARNS = 0.1  # posterior sd of draws, nat of densities, 95 % quantile: what `check=` warns of
EXTENT_ENTRIES = 4_096  # above which one extent serves all
ROUNDING = 16 * float(np.finfo(np.float32).eps)  # of a value: a last digit is then less than CHECK_WARNS
FAR = 2.0  # times the training set's most extreme value: what is warned of


def as_array(
    x: Any, shape: tuple[int, ...], name: str, *, many: tuple[int, ...] = (), missing: bool | None = None
) -> np.ndarray:
    """`x` as a float32 array of this shape.

    `many`: axes of `shape` whose length is free, so that the message says n. `missing`: of data, whether NaN may stand for an entry
    that is missing; None: of what is no data.

    Raises ValueError, by `name`, for what is no array of real numbers, another shape, and values that are NaN or infinite.
    """
    says = f"({', '.join('n' if i in many else str(n) for i, n in enumerate(shape))}{',' if len(shape) == 1 else ''})"
    array = as_reals(x, says, name)
    if array.shape != shape:
        hint = _reshape_hint(array.shape, shape, name)
        if not hint and not many and 1 < array.size == math.prod(shape):
            hint = f" If its {array.size} numbers are in that order: {name}.reshape{says}."
        elif missing and not hint and array.ndim == len(shape) and array.size < math.prod(shape):
            hint = " Fill up with NaN what is missing."
        raise ValueError(f"{name} must have shape {says} for this posterior; got {array.shape}.{hint}")
    bad = ~(np.isfinite(array) | (np.isnan(array) if missing else False))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        kind = "infinite (NaN is what is missing)" if missing else "NaN or infinite"
        raise ValueError(
            f"{name} has {int(bad.sum())} values that are {kind}, the first at {where}; remove or impute them"
            f"{', or train with missing=True (on the command line --missing)' if missing is False else ''}."
        )
    return array


def as_reals(x: Any, says: str, name: str) -> np.ndarray:
    """`x` as a float32 array; numbers beyond float32 become inf. `says`: the shape it should have. Raises ValueError, by `name`, for what is no array
    of real numbers."""
    try:
        array = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers of shape {says}; got {type(x).__name__}.") from error
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise ValueError(
            f"{name} must be an array of real numbers of shape {says}; got {type(x).__name__} of dtype {array.dtype}."
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _reshape_hint(given: tuple[int, ...], wanted: tuple[int, ...], name: str) -> str:
    if len(given) == len(wanted) == 3 and given[1:] == wanted[1:] and name == "x_o":
        return " For many observations see sample_batched and log_prob_batched."
    for index in ("[None, :, None]", "[None]", "[..., None]", "[:, None]", "[:, :, None]", "[None, None]"):
        probe = np.empty(given, np.bool_)
        try:
            shape = _indexed_shape(probe, index)
        except IndexError:
            continue
        if shape == wanted or (len(wanted) == 3 and len(shape) == 3 and shape[1:] == wanted[1:]):
            return f" Add the axes with {name}{index}."
    return ""


def _indexed_shape(array: np.ndarray, index: str) -> tuple[int, ...]:
    """Shape of `array[index]` for an index written as in Python source, of None, : and ... only."""
    parts = {"None": None, ":": slice(None), "...": Ellipsis}
    return array[tuple(parts[p.strip()] for p in index[1:-1].split(","))].shape


def warn_far(xs: np.ndarray, scales: Standardizer, facts: Mapping[str, Any]) -> np.ndarray:
    """xs. `scales`: in numpy arrays, so that no device is asked. Warns of observations far outside the data that the posterior was trained on, where it can say nothing.

    `facts`: of the posterior, "x_extent" (see `far_rows`) and "x_missing" (see `sparse_rows`) of those data, where they are known.
    """
    for row, says in list(sparse_rows(xs, facts.get("x_missing")).items())[:1]:
        warn(f"x[{row}] {says}")
    far = far_rows(xs, scales, facts.get("x_extent"))
    if far:
        row = max(far, key=lambda i: far[i][0])
        warn(f"x[{row}] {far_says(xs[row], *far[row])}")
    return xs


def far_rows(xs: np.ndarray, scales: Standardizer, extent: Sequence[float] | None) -> dict[int, tuple[float, int]]:
    """Rows of xs that lie far outside the simulations: how many times as far as any of these, and in which entry. `extent`: the largest absolute
    standardised value of every entry among these, or one number for all; None: not known."""
    far: dict[int, tuple[float, int]] = {}
    for start, z in standardised(xs, scales) if extent else ():
        z = np.where(np.isnan(z), 0.0, z) / np.maximum(np.asarray(extent), 1.0)
        for i in np.flatnonzero((z > FAR).any(1)):
            entry = int(z[i].argmax())
            far[start + int(i)] = float(z[i, entry]), entry
    return far


def sparse_rows(xs: np.ndarray, most: int | None) -> dict[int, str]:
    """Rows of xs of which more is missing than of any simulation, and how much, as a sentence without its subject. `most`: missing entries of a
    simulation, at most; None: not known."""
    if most is None:
        return {}
    counts = missing_counts(xs)
    return {
        int(
            row
        ): f"has {counts[row]:,} of {xs[row].size:,} entries missing, and no simulation had more than {most:,}: what is drawn of it may be "
        f"far too narrow. Simulate data with as much missing."
        for row in np.flatnonzero(counts > most)
    }


def missing_counts(xs: np.ndarray) -> np.ndarray:
    """Missing entries of each row."""
    return np.isnan(xs).reshape(len(xs), -1).sum(1) if len(xs) else np.zeros(0, int)


def extent(xs: np.ndarray, scales: Standardizer, *, alike: bool = False) -> list[float]:
    """The largest absolute standardised value of every entry among xs; one number for all where they are `alike`, or many."""
    largest = np.zeros(xs[0].size)
    for _, z in standardised(xs, scales):
        largest = np.fmax(largest, np.fmax.reduce(z, axis=0))
    return [float(f"{v:.4g}") for v in ([largest.max()] if alike or largest.size > EXTENT_ENTRIES else largest)]


def far_says(x: np.ndarray, times: float, entry: int) -> str:
    """What `far_rows` found of one row, as a sentence without its subject."""
    return (
        f"lies far outside the simulations: its entry {entry} ({x.ravel()[entry]:g}) is {times:.3g} times as far from "
        f"their mean as any of theirs. Such draws mean nothing: check its units, or simulate from a wider prior."
    )


def standardised(xs: np.ndarray, scales: Standardizer) -> Iterator[tuple[int, Float[np.ndarray, "rows entries"]]]:
    """(first row, absolute standardised values) of observations, block by block. `scales`: in numpy arrays."""
    for start in range(0, len(xs), BLOCK_ROWS):
        with np.errstate(over="ignore"):
            z = np.abs(scales.forward_x(xs[start : start + BLOCK_ROWS], np))  # type: ignore[arg-type]
        yield start, z.reshape(len(z), -1)


def check_inside(xs: np.ndarray, standardizer: Standardizer, names: Sequence[str]) -> np.ndarray:
    """xs [batch, dim_x, ch_x], where they are parameters that a joint model is given, called `names`. Raises ValueError for one outside its
    prior: the bijection would take the bound in its place."""
    if standardizer.x_bijection is None or not standardizer.x_bijection.is_bounded:
        return xs
    low, high = standardizer.x_bijection.bounds
    for row, i, ch in np.argwhere((xs < low) | (xs > high))[:1]:
        name = names[i] if names else f"number {i} of what is given"
        raise ValueError(
            f"{name} is given as {xs[row, i, ch]:g}, outside its prior ({low[i, 0]:g}, {high[i, 0]:g}); give a value inside."
        )
    return xs


def one_of(**words: Any) -> Any:
    """The one of synonymous arguments, by name, that was given. Raises ValueError for more than one, or none."""
    given = [value for value in words.values() if value is not None]
    if len(given) != 1:
        *first, last = words
        raise ValueError(f"give {', '.join(first)} or {last}, {'only one' if given else 'one of them is needed'}.")
    return given[0]


def as_ids(observation_ids: Any, count: int) -> np.ndarray:
    """The ids of so many observations; None: 0, 1, 2, ... Raises ValueError unless there is one for each."""
    ids = np.arange(count) if observation_ids is None else observation_ids
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids, object)  # numpy would make floats of ids beyond int64
    if ids.shape != (count,):
        raise ValueError(f"observation_ids must have shape ({count},), one per observation; got {ids.shape}.")
    return ids


def draws_asked(nsamples: Any, num_samples: Any, default: int) -> int:
    """The number of draws that a call asks for, in our word or in GenSBI's. Raises ValueError for both, and as `check_nsamples` does."""
    if nsamples is None and num_samples is None:
        return default
    return check_nsamples(one_of(nsamples=nsamples, num_samples=num_samples))


def check_nsamples(nsamples: Any) -> int:
    """Raises ValueError for what is no number of draws."""
    if isinstance(nsamples, bool) or not isinstance(nsamples, (int, np.integer)) or not 0 < nsamples <= keys.MAX_DRAWS:
        raise ValueError(f"nsamples must be a positive integer (at most 2**32); got {nsamples!r}.")
    return int(nsamples)


class SolveError(RuntimeError):
    """The solver did not end in finite numbers for some observations. All others are done.

    `made`: what was asked for, [batch, nsamples, ...], not finite where it failed; `failed`: rows of the batch that did.
    """

    def __init__(self, failed: dict[int, int], ids: np.ndarray, unit: str, made: np.ndarray):
        self.failed, self.made = sorted(failed), made
        self._arguments = failed, ids, unit, made
        row = self.failed[0]
        more = f", and of {len(failed) - 1} more of {len(made)} observations" if len(failed) > 1 else ""
        done = " What was made is in this error's `made`." if len(made) > len(failed) else ""
        super().__init__(
            f"{failed[row]} {unit} of observation {row} (id {ids[row]}){more} are not finite: the solver did not converge there. "
            f"The observation may lie far outside the training data; or loosen rtol and atol, or use more steps.{done}"
        )

    def __reduce__(self) -> Any:
        """Of its arguments: an exception is else made anew, in another process, of its message."""
        return type(self), self._arguments


def unsolved(parts: Sequence[np.ndarray], make: str) -> Bool[np.ndarray, "draws"]:
    """Which draws, what was made of each in arrays [draws, ...], are not finite, or have a density that is NaN (a log p may be -inf)."""
    density = {tiles.DENSITY: (0,), tiles.DRAWS_AND_DENSITY: (1,)}.get(make, ())
    bad = np.zeros(len(parts[0]), bool)
    for i, part in enumerate(parts):
        there = np.isnan(part) if i in density else ~np.isfinite(part)
        if there.any():
            bad |= there.reshape(len(bad), -1).any(axis=1)
    return bad


def compare_densities(density: np.ndarray, refined: np.ndarray) -> dict[str, float]:
    """What halving the steps changes, in nat: mean and 95 % quantile over points where there is a density."""
    there = np.isfinite(density) & np.isfinite(refined)
    error = np.abs(density[there] - refined[there])
    mean, q95 = (float(error.mean()), float(np.quantile(error, 0.95))) if error.size else (0.0, 0.0)
    if q95 > CHECK_WARNS:
        warn(
            f"halving the solver's steps moves 5 % of the densities by more than {q95:.2g} nat; use more steps.",
        )
    return {"points": int(error.size), "mean": mean, "q95": q95}


def compare(draws: np.ndarray, refined: np.ndarray, sd: np.ndarray) -> dict[str, float]:
    """What halving the steps changes, in standard deviations of each posterior: largest over parameters, median and 95 % quantile over
    draws. The sd counts as `ROUNDING` of the value at least: of a parameter that does not vary rounding is no change."""
    least = np.maximum(ROUNDING * np.abs(draws), np.finfo(np.float32).tiny)
    error = (np.abs(draws - refined) / np.maximum(sd, least)).max(axis=(-2, -1))
    q95 = float(np.quantile(error, 0.95))
    if q95 > CHECK_WARNS:
        warn(
            f"halving the solver's steps moves 5 % of the draws by more than {q95:.2g} posterior sd; use more steps.",
        )
    return {"draws": int(error.size), "median": float(np.median(error)), "q95": q95}
