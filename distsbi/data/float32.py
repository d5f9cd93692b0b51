"""Data are float32 from here on: not silently where that would take from them what tells them apart."""

import numpy as np

ROWS = 20  # fewer may be alike by chance
LOST = 1e-3  # of the range of a column: the rounding from which on it is refused
CONSTANT = 1e-12  # relative: the range of a column that is constant but for the rounding of float64
BLOCK_BYTES = 64 * 2**20


def as_float32(what: str, array: np.ndarray) -> np.ndarray:
    """Rows of numbers [n, ...] in float32; those beyond its range become infinite.

    Raises ValueError for columns that float32 rounds to a part of their range that matters, such as times in seconds since 1970 that lie
    within a minute.
    """
    with np.errstate(over="ignore"):
        small = array.astype(np.float32, copy=False)
    exact = array.dtype.kind == "b" or np.can_cast(array.dtype, np.float32)
    if exact or len(array) < ROWS or not array.size:
        return small
    wide, narrow = array.reshape(len(array), -1), small.reshape(len(array), -1)
    low, high, rounding = (np.full(wide.shape[1], value) for value in (np.inf, -np.inf, 0.0))
    rows = max(1, BLOCK_BYTES // (8 * wide.shape[1]))
    for start in range(0, len(wide), rows):
        block, rounded = np.asarray(wide[start : start + rows], np.float64), narrow[start : start + rows]
        low, high = np.fmin(low, np.fmin.reduce(block)), np.fmax(high, np.fmax.reduce(block))
        with np.errstate(invalid="ignore"):
            off = np.where(np.isfinite(rounded), np.abs(block - rounded), 0.0)
        rounding = np.maximum(rounding, off.max(0))
    with np.errstate(invalid="ignore"):
        varies = high - low > CONSTANT * np.maximum(np.abs(low), np.abs(high))
        lost = np.flatnonzero(varies & (rounding > LOST * (high - low)))
    if lost.size:
        at = int(lost[0])
        where = ", ".join(str(int(i)) for i in np.unravel_index(at, array.shape[1:]))
        raise ValueError(
            f"{what}[:, {where}] goes from {float(low[at])!r} to {float(high[at])!r}, which float32 cannot tell apart: subtract a reference value from it, such as "
            f"{float(low[at])!r}{f' ({lost.size} columns are like this)' if lost.size > 1 else ''}."
        )
    return small
