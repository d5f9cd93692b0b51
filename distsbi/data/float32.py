"""Data are float32 from here on: not silently where that would take from them what tells them apart."""

import numpy as np

from distsbi.hints import warn

ROWS = 20  # fewer may be alike by chance
LOST = 1e-3  # of the range of a column: the rounding from which on it is refused
NOISE = 1e-12  # relative: the range of a column that is constant but for the rounding of float64
CONSTANT_STEPS = 16  # of float32, over which a sum or a product that should be constant may be rounded
STEPS = 500  # of float32 that tell the rows of a column apart, as LOST says of rounding by half a step
CONSTANT = 1e-7  # relative: the range of what may be a constant, such as what a solver of an ODE conserves
BLOCK_BYTES = 64 * 2**20


class Columns:
    """How far the columns of an array go that comes in parts [n, ...], and how far float32 rounds them."""

    def __init__(self) -> None:
        self.rows, self.shape = 0, ()
        self.low = self.high = self.rounding = np.zeros(0)

    def add(self, array: np.ndarray) -> None:
        """Rows of the array, as they came."""
        if array.dtype.kind == "b" or np.can_cast(array.dtype, np.float32) or not array.size:
            return
        wide = array.reshape(len(array), -1)
        if not self.rows:
            self.shape = array.shape[1:]
            self.low, self.high, self.rounding = (np.full(wide.shape[1], value) for value in (np.inf, -np.inf, 0.0))
        self.rows += len(wide)
        count = max(1, BLOCK_BYTES // (8 * wide.shape[1]))
        for start in range(0, len(wide), count):
            block = np.asarray(wide[start : start + count], np.float64)
            self.low = np.fmin(self.low, np.fmin.reduce(block))
            self.high = np.fmax(self.high, np.fmax.reduce(block))
            with np.errstate(invalid="ignore", over="ignore"):
                rounded = block.astype(np.float32)
                off = np.where(np.isfinite(rounded), np.abs(block - rounded), 0.0)
            self.rounding = np.maximum(self.rounding, off.max(0))

    def check(self, what: str, *, constants: bool = False) -> None:
        """Raises ValueError for columns that float32 rounds to a part of their range that matters, such as times in seconds since 1970 that lie
        within a minute. `constants`: what varies by less than 1e-7 of itself is warned of, for it may be constant but for a solver's error."""
        if self.rows < ROWS:
            return
        with np.errstate(invalid="ignore"):
            span = self.high - self.low
            varies = span / np.maximum(np.maximum(np.abs(self.low), np.abs(self.high)), np.finfo(float).tiny)
            lost = np.flatnonzero((varies > NOISE) & (self.rounding > LOST * span))
        if not lost.size:
            return
        at = int(lost[np.argmax(varies[lost])])
        where = ", ".join(str(int(i)) for i in np.unravel_index(at, self.shape))
        low, high = float(self.low[at]), float(self.high[at])
        says = f"{what}[:, {where}] goes from {low!r} to {high!r}, which float32 cannot tell apart"
        alike = f" ({lost.size} columns are like this)" if lost.size > 1 else ""
        if constants and varies[at] < CONSTANT:
            warn(
                f"{says}: it is taken for a constant. If it says something, subtract a reference value from it, such as {low!r}{alike}.",
            )
            return
        raise ValueError(f"{says}: subtract a reference value from it, such as {low!r}, or leave it out{alike}.")


def check_float32(what: str, array: np.ndarray, *, constants: bool = False) -> None:
    """`Columns.check` of a whole array."""
    columns = Columns()
    columns.add(array)
    columns.check(what, constants=constants)


def warn_of_steps(what: str, array: np.ndarray) -> None:
    """Warns of columns of an array that is float32 already, [n, ...], which goes through few steps of float32: what told its rows apart was rounded away
    before, as in Julian dates of one night from a simulator. (One step may be a constant.)"""
    if len(array) < ROWS or not array.size:
        return
    low, high = np.fmin.reduce(array).astype(np.float64), np.fmax.reduce(array).astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest = np.maximum(np.abs(low), np.abs(high)).astype(np.float32)
        steps = (high - low) / np.spacing(largest, where=np.isfinite(largest), out=np.ones_like(largest))
        few = np.argwhere((steps > 1) & (steps < STEPS))
    if len(few):
        at = tuple(few[np.argmax(steps[tuple(few.T)])])
        where = f"{what}[:, {', '.join(map(str, at))}] goes from {float(low[at])!r} to {float(high[at])!r} in {steps[at]:.0f} steps of float32"
        alike = f" ({len(few)} columns are like this)" if len(few) > 1 else ""
        advice = "subtract a reference value before it is made float32, in a simulator too"
        warn(
            f"{where}: if it is a constant but for rounding, leave it out; if not, {advice}{alike}."
            if steps[at] < CONSTANT_STEPS
            else f"{where}: what it says is mostly rounded away; {advice}{alike}."
        )
