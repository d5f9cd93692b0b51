"""Elementwise bijections of what is bounded, or positive over decades, to the real line:

    interval (low, high)    u = probit((theta - low) / (high - low))
    the same, over decades  u = probit(log(theta / low) / log(high / low))
    theta > low             u = log(max(theta - low, floor))
    theta < high            u = -log(max(high - theta, floor))
    real                    u = theta

The floor, a small part of the median distance, keeps a theta that is the bound from setting the scale of all; so do the edges, the
probabilities at which the probit is cut off. Under the probit a uniform prior is a standard normal, and under the logarithm one that is
uniform in it.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

REAL, INTERVAL, DECADES, ABOVE, BELOW = "real", "interval", "decades", "above", "below"
POSITIVE = "positive"  # of x: what all were in training, but no bound
_EDGE = 1e-6  # from where on probabilities are cut off at either end, or less: float32 uniforms at an edge stay finite
_DECADES = 10.0  # high / low from which on an interval may be one of decades
_LEAST_WIDTH = 1e-5  # of the bounds: about a hundred numbers of float32
_X_DECADES = 100.0  # of the 95 % and the 5 % quantile, from which on positive entries of x are taken by their logarithm
_X_ROWS = 20_000  # evenly spaced, of which these are
_LOG_RANGE = 80.0  # exp stays inside float32
_FLOOR = 1e-6  # of the median distance of theta from the bound of its half line
_TINY = float(np.finfo(np.float32).tiny)  # smaller numbers are 0 on most devices


@dataclasses.dataclass(frozen=True)
class Support:
    """The interval (low, high) that a parameter lives in; an infinite end is open."""

    low: float = -np.inf
    high: float = np.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a support needs low < high; got ({self.low}, {self.high}).")
        if self.kind == INTERVAL and self.high - self.low < _LEAST_WIDTH * max(abs(self.low), abs(self.high)):
            raise ValueError(
                f"the support ({self.low!r}, {self.high!r}) is too narrow for float32 where it lies: let the parameter be the difference from a "
                f"reference value, such as {self.low!r}."
            )

    @property
    def kind(self) -> str:
        low, high = np.isfinite(self.low), np.isfinite(self.high)
        return INTERVAL if low and high else ABOVE if low else BELOW if high else REAL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bijection:
    """Of the rows of values [dim, channels], each of its kind. A pytree; `kinds` is static."""

    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    low: Float[Array, "dim 1"]
    high: Float[Array, "dim 1"]
    # the smallest distance from the bound of a half line; None, in runs of before: the smallest float
    floor: Float[Array, "dim 1"] | None = None
    # of an interval, the smallest distance from low and from high, in parts of its width (or of that of its logarithm); None: _EDGE
    edges: Float[Array, "dim 2"] | None = None

    @classmethod
    def of_parameters(cls, theta: Float[np.ndarray, "n dim_theta ch_theta"], supports: Sequence[Support]) -> Self:
        """From their supports; from training values the floors and edges, and which intervals are filled over decades."""
        low = np.asarray([[s.low if np.isfinite(s.low) else 0.0] for s in supports], np.float32)
        high = np.asarray([[s.high if np.isfinite(s.high) else 0.0] for s in supports], np.float32)
        kinds = tuple(DECADES if _over_decades(theta[:, i], s) else s.kind for i, s in enumerate(supports))
        floor, edges = _floors(theta, kinds, low, high), _edges(theta, kinds, low, high)
        return cls(kinds, low, high, floor, edges)  # type: ignore[arg-type]

    @classmethod
    def of_data(cls, x: Float[np.ndarray, "n dim_x ch_x"]) -> Self | None:
        """The logarithm of the entries that are positive and span decades; None where there are none."""
        some = x[np.linspace(0, len(x) - 1, min(len(x), _X_ROWS)).round().astype(int)] if len(x) else x
        if not some.size:
            return None
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # an entry that is always missing
            few, middle, many = np.nanquantile(some, (0.05, 0.5, 0.95), axis=0)
            # the median in the lower three quarters of the logarithms: not a few small numbers among others that are alike
            over = (np.nanmin(x, axis=0) > 0) & (many >= _X_DECADES * few) & (middle / few < (many / few) ** 0.75)
        which = over.all(-1)
        if not which.any():
            return None
        kinds = tuple(POSITIVE if positive else REAL for positive in which)
        zero = np.zeros((len(which), 1), np.float32)
        return cls(kinds, zero, zero, _floors(np.asarray(x, np.float32), kinds, zero, zero))  # type: ignore[arg-type]

    @classmethod
    def identity(cls, dim: int) -> Self:
        zero = np.zeros((dim, 1), np.float32)
        return cls((REAL,) * dim, zero, zero)  # type: ignore[arg-type]

    def rows(self, which: Sequence[int]) -> Self:
        """The bijection of these rows."""
        kinds, chosen = tuple(self.kinds[i] for i in which), list(which)
        return jax.tree.map(lambda array: np.asarray(array)[chosen], dataclasses.replace(self, kinds=kinds))

    def forward(self, theta: Float[Array, "... dim channels"], xp: Any = jnp) -> Float[Array, "... dim channels"]:
        """u, on the real line. `xp`: numpy, of numpy arrays, asks no device and compiles nothing; for checks, for it rounds otherwise."""
        u = theta
        if INTERVAL in self.kinds:
            width = xp.where(self._is(INTERVAL), self.high - self.low, 1.0)
            low, high = (theta - self.low) / width, (self.high - theta) / width
            u = xp.where(self._is(INTERVAL), self._probit(low, high, xp), u)
        if DECADES in self.kinds:
            low, ratio = self._decades(xp)
            part = (xp.log(xp.maximum(theta, low)) - xp.log(low)) / ratio
            u = xp.where(self._is(DECADES), self._probit(part, 1 - part, xp), u)
        least = _TINY if self.floor is None else self.floor
        if ABOVE in self.kinds or POSITIVE in self.kinds:
            u = xp.where(self._is(ABOVE, POSITIVE), xp.log(xp.maximum(theta - self.low, least)), u)
        if BELOW in self.kinds:
            u = xp.where(self._is(BELOW), -xp.log(xp.maximum(self.high - theta, least)), u)
        return u

    def inverse(self, u: Float[Array, "... dim channels"]) -> Float[Array, "... dim channels"]:
        """theta inside its support."""
        theta = u
        if INTERVAL in self.kinds:  # from the nearer bound, for numbers near 0 are finer than those near 1
            away = self._width() * ndtr(-jnp.abs(u))
            theta = jnp.where(self._is(INTERVAL), jnp.where(u < 0, self.low + away, self.high - away), theta)
        if DECADES in self.kinds:
            low, ratio = self._decades()
            theta = jnp.where(self._is(DECADES), low * jnp.exp(ratio * ndtr(u)), theta)
        if ABOVE in self.kinds or POSITIVE in self.kinds:
            theta = jnp.where(
                self._is(ABOVE, POSITIVE), self.low + jnp.exp(jnp.clip(u, -_LOG_RANGE, _LOG_RANGE)), theta
            )
        if BELOW in self.kinds:
            theta = jnp.where(self._is(BELOW), self.high - jnp.exp(jnp.clip(-u, -_LOG_RANGE, _LOG_RANGE)), theta)
        if set(self.kinds) <= {REAL}:
            return theta
        # at least one float inside: rounding ends on bounds, which an open interval has not
        least = jnp.where(self._has_low, _next(self.low, 1.0), -jnp.inf)
        most = jnp.where(self._has_high, _next(self.high, -1.0), jnp.inf)
        return jnp.clip(theta, least, most)

    def log_det(self, u: Float[Array, "... dim channels"]) -> Float[Array, "... dim channels"]:
        """log|du/dtheta| of each entry, at the theta that `u` stands for."""
        per = jnp.zeros_like(u)
        normal = -0.5 * u**2 - 0.5 * np.log(2 * np.pi)
        if INTERVAL in self.kinds:
            per = jnp.where(self._is(INTERVAL), -normal - jnp.log(self._width()), per)
        if DECADES in self.kinds:
            low, ratio = self._decades()
            log_theta = jnp.log(low) + ratio * ndtr(u)
            per = jnp.where(self._is(DECADES), -normal - log_theta - jnp.log(ratio), per)
        if ABOVE in self.kinds:
            per = jnp.where(self._is(ABOVE), -u, per)
        if BELOW in self.kinds:
            per = jnp.where(self._is(BELOW), u, per)
        return per

    def contains(self, theta: Float[Array, "... dim channels"]) -> Array:
        """Whether theta lies inside the support, over all rows: bool [...]."""
        below, above = self._has_low & (theta < self.low), self._has_high & (theta > self.high)
        return ~jnp.any(below | above, axis=(-2, -1))

    @property
    def is_bounded(self) -> bool:
        """Whether any row has a bound."""
        return not set(self.kinds) <= {REAL, POSITIVE}

    @property
    def bounds(self) -> tuple[Float[np.ndarray, "dim 1"], Float[np.ndarray, "dim 1"]]:
        """(low, high) of the rows, infinite where there is none."""
        return np.where(self._has_low, self.low, -np.inf), np.where(self._has_high, self.high, np.inf)

    @property
    def supports(self) -> list[Support]:
        """Where the rows live."""
        return [Support(*ends) for ends in zip(*(bound.ravel().tolist() for bound in self.bounds), strict=True)]

    def _probit(self, part: Array, rest: Array, xp: Any) -> Array:
        """Of a part of an interval and of the rest: of the smaller, which is the finer, so that its derivative is finite too. Rows of other kinds have
        any parts: theirs is one that a probit takes, for a derivative of NaN would stay one."""
        first, last = (_EDGE, _EDGE) if self.edges is None else (self.edges[:, :1], self.edges[:, 1:])
        lower, probit = part < rest, ndtri if xp is jnp else scipy.special.ndtri
        nearer = xp.where(lower, xp.maximum(part, first), xp.maximum(rest, last))
        u = probit(xp.where(nearer >= 1, 0.5, nearer))
        return xp.where(lower, u, -u)

    @property
    def _has_low(self) -> np.ndarray:
        return self._is(INTERVAL, DECADES, ABOVE)

    @property
    def _has_high(self) -> np.ndarray:
        return self._is(INTERVAL, DECADES, BELOW)

    def _is(self, *kinds: str) -> np.ndarray:
        return np.asarray([[kind in kinds] for kind in self.kinds]).reshape(-1, 1)

    def _width(self) -> Array:
        return jnp.where(self._is(INTERVAL), self.high - self.low, 1.0)

    def _decades(self, xp: Any = jnp) -> tuple[Array, Array]:
        """(low, log(high / low)) of the intervals over decades; (1, 1) of others."""
        low, high = (xp.where(self._is(DECADES), end, 1.0) for end in (self.low, self.high))
        ratio = xp.log(high) - xp.log(low)
        return low, xp.where(self._is(DECADES), ratio, 1.0)


def _next(bound: Array, direction: float) -> Array:
    """The next float32 in a direction, past 0 the next that no device takes for 0."""
    near = jnp.nextafter(bound, jnp.full_like(bound, direction * jnp.inf))
    return jnp.where(jnp.abs(near) < _TINY, direction * _TINY, near)


def _over_decades(theta: np.ndarray, support: Support) -> bool:
    """Whether the logarithm of a parameter in an interval fills its interval more evenly than the parameter does, by their medians."""
    low, high = np.float32(support.low), np.float32(support.high)
    if support.kind != INTERVAL or not low >= _TINY or high < _DECADES * low:
        return False
    median = np.median(theta, axis=0).clip(low, high).astype(np.float64)
    linear, decades = (median - low) / (high - low), np.log(median / low) / np.log(high / low)
    return bool(np.all(abs(decades - 0.5) < abs(linear - 0.5)))


def _edges(theta: np.ndarray, kinds: tuple[str, ...], low: np.ndarray, high: np.ndarray) -> Float[np.ndarray, "dim 2"]:
    """The smallest distances from both bounds of each interval, in parts of its width: _EDGE, and less where many lie that near."""
    edges = np.full((len(kinds), 2), _EDGE, np.float32)
    for i, kind in enumerate(kinds):
        if kind == INTERVAL:
            for side, distance in enumerate((theta[:, i] - low[i], high[i] - theta[:, i])):
                median, spread = _spread(distance / (high[i] - low[i]))
                edges[i, side] = _EDGE if spread > _FLOOR else min(_EDGE, max(_TINY, median * spread))
    return edges


def _floors(theta: np.ndarray, kinds: tuple[str, ...], low: np.ndarray, high: np.ndarray) -> Float[np.ndarray, "dim 1"]:
    """The smallest distance from the bound of each half line: a small part of the median, and less where they are spread wider than that."""
    floors = np.full((len(kinds), 1), _TINY, np.float32)
    for i, kind in enumerate(kinds):
        if kind in (ABOVE, BELOW, POSITIVE):
            median, spread = _spread(high[i] - theta[:, i] if kind == BELOW else theta[:, i] - low[i])
            floors[i] = max(_TINY, median * min(_FLOOR, spread))
    return floors


def _spread(distance: np.ndarray) -> tuple[float, float]:
    """(the median distance from a bound, the part of it that is about ten standard deviations of the logarithm below it); (0, 1) where all lie
    on the bound."""
    away = distance[distance > 0].astype(np.float64)
    if not away.size:
        return 0.0, 1.0
    quartile, median = np.quantile(away, (0.25, 0.5))
    return median, (quartile / median) ** 15
