"""Standardisation is part of the model: the network sees unbounded, z-scored parameters and z-scored data.

Parameters go through an elementwise bijection of the prior's support to the real line, then z-scoring:

    interval (low, high)    u = probit((theta - low) / (high - low))
    the same, over decades  u = probit(log(theta / low) / log(high / low))
    theta > low             u = log(max(theta - low, floor))
    theta < high            u = -log(max(high - theta, floor))
    real                    u = theta

so that no draw leaves the prior or lies on a bound of it, and log|du/dtheta| enters the log-density. The floor, a small part of the
median distance, keeps a theta that is the bound from setting the scale of all; so do the probabilities at which the probit is cut off. Under
the probit a uniform prior is a standard normal, the very distribution that the path starts from, and under the logarithm one that is uniform
in it. Entries of x that are positive and span decades, such as fluxes, are taken by their logarithm, too. What x says linearly is then taken out in closed form,

    y = S^(-1/2) (u - A x),    A: least squares of u on x,    S: covariance of what is left

(u and x z-scored), so the network learns the shape of a posterior that is centred and of unit scale already, and the
posterior of a linear-Gaussian problem is the very noise that the path starts from.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

REAL, INTERVAL, DECADES, ABOVE, BELOW = "real", "interval", "decades", "above", "below"
POSITIVE = "positive"  # of x: what all were in training, but no bound
_EDGE = 1e-6  # from where on probabilities are cut off at either end, or less: float32 uniforms at an edge stay finite
_DECADES = 10.0  # high / low from which on an interval may be one of decades
_X_DECADES = 100.0  # of the 95 % and the 5 % quantile, from which on positive entries of x are taken by their logarithm
_X_ROWS = 20_000  # evenly spaced, of which these are
_LOG_RANGE = 80.0  # exp stays inside float32
_ROWS_PER_COLUMN = 10  # pairs for each column of x below which least squares would fit noise
_MOST_COLUMNS = 2_048
_SMALLEST = 1e-3  # of the scales S^(1/2): a parameter that x fixes linearly keeps a scale
_RIDGE = 1e-6
_FLOOR = 1e-6  # of the median distance of theta from the bound of its half line
_TINY = float(np.finfo(np.float32).tiny)  # smaller numbers are 0 on most devices
_BLOCK_BYTES = 16 * 2**20  # of float64 rows that scales are summed over at a time


@dataclasses.dataclass(frozen=True)
class Support:
    """The interval (low, high) that a parameter lives in; an infinite end is open."""

    low: float = -np.inf
    high: float = np.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a support needs low < high; got ({self.low}, {self.high}).")

    @property
    def kind(self) -> str:
        low, high = np.isfinite(self.low), np.isfinite(self.high)
        return INTERVAL if low and high else ABOVE if low else BELOW if high else REAL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standardizer:
    """Bijection and scales of theta [dim_theta, ch_theta], scales of x [dim_x, ch_x], least squares between the two, with
    both sides flattened. A pytree; `kinds` is static."""

    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    low: Float[Array, "dim_theta 1"]
    high: Float[Array, "dim_theta 1"]
    theta_mean: Float[Array, "dim_theta ch_theta"]
    theta_std: Float[Array, "dim_theta ch_theta"]
    x_mean: Float[Array, "dim_x ch_x"]
    x_std: Float[Array, "dim_x ch_x"]
    slope: Float[Array, "n_x n_theta"]  # A, transposed
    root: Float[Array, "n_theta n_theta"]  # S^(1/2), symmetric
    inverse_root: Float[Array, "n_theta n_theta"]
    # of given parameters of a joint model, which go through their bijection too, and of x over decades; empty: x is real
    x_kinds: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    x_low: Float[Array, "dim_x 1"] | None = None
    x_high: Float[Array, "dim_x 1"] | None = None
    # the smallest distance from the bound of a half line; None, in runs of before: the smallest float
    floor: Float[Array, "dim_theta 1"] | None = None
    x_floor: Float[Array, "dim_x 1"] | None = None
    # of an interval, the smallest distance from low and from high, in parts of its width (or of that of its logarithm); None: _EDGE
    edges: Float[Array, "dim_theta 2"] | None = None
    x_edges: Float[Array, "dim_x 2"] | None = None

    @classmethod
    def fit(
        cls,
        theta: Float[np.ndarray, "n dim_theta ch_theta"],
        x: Float[np.ndarray, "n dim_x ch_x"],
        supports: Sequence[Support],
        *,
        linear: bool = True,
        decades: bool = True,
        pool: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> Self:
        """Scales from training pairs. A constant column keeps its mean and gets scale 1. `linear`: with least squares. `decades`: the logarithm of
        entries of x that are positive and span decades. `pool`: makes (means, standard deviations) of x equal where entries share a scale.

        Raises ValueError if there are not as many supports as parameters.
        """
        if len(supports) != theta.shape[1]:
            raise ValueError(f"the prior has {len(supports)} parameters, theta has {theta.shape[1]}.")
        low = np.asarray([[s.low if np.isfinite(s.low) else 0.0] for s in supports], np.float32)
        high = np.asarray([[s.high if np.isfinite(s.high) else 0.0] for s in supports], np.float32)
        theta = np.asarray(theta, np.float32)
        kinds = tuple(DECADES if _over_decades(theta[:, i], s) else s.kind for i, s in enumerate(supports))
        zero, one = np.zeros(theta.shape[1:], np.float32), np.ones(theta.shape[1:], np.float32)
        x = np.asarray(x)
        x_fields: Any = _over_x_decades(x) if decades else {}
        if x_fields:
            u_x = _unbound(
                jnp.asarray(x, jnp.float32),
                x_fields["x_kinds"],
                x_fields["x_low"],
                x_fields["x_high"],
                x_fields["x_floor"],
                None,
            )
            x = np.asarray(u_x)
        x_mean, x_std = _scales(x)
        if pool is not None:
            x_mean, x_std = pool(x_mean, x_std)
        eye = np.eye(zero.size, dtype=np.float32)
        flat = np.zeros((x_mean.size, zero.size), np.float32)
        fields: Any = (low, high, zero, one, x_mean.astype(np.float32), x_std.astype(np.float32), flat, eye, eye)
        floor: Any = _floors(theta, kinds, low, high)
        edges: Any = _edges(theta, kinds, low, high)
        bare = cls(kinds, *fields, floor=floor, edges=edges, **x_fields)
        u = np.concatenate([bare.unbound(jnp.asarray(theta[part])) for part in _parts(theta)])
        mean, std = _scales(u)
        slope, root, inverse_root = flat, eye, eye
        if linear:
            slope, root, inverse_root = _least_squares(u, (mean, std), x, (x_mean, x_std))
        return dataclasses.replace(
            bare,
            theta_mean=mean.astype(np.float32), theta_std=std.astype(np.float32),
            slope=slope.astype(np.float32), root=root.astype(np.float32), inverse_root=inverse_root.astype(np.float32),
        )  # fmt: skip

    @classmethod
    def identity(cls, dim_theta: int, dim_x: int, ch_theta: int = 1, ch_x: int = 1) -> Self:
        """For parameters and data that are on the network's scale already."""

        def array(value: float, *shape: int) -> Any:
            return np.full(shape, value, np.float32)

        n = dim_theta * ch_theta
        eye: Any = np.eye(n, dtype=np.float32)
        return cls(
            (REAL,) * dim_theta, array(0, dim_theta, 1), array(0, dim_theta, 1), array(0, dim_theta, ch_theta),
            array(1, dim_theta, ch_theta), array(0, dim_x, ch_x), array(1, dim_x, ch_x), array(0, dim_x * ch_x, n), eye, eye,
        )  # fmt: skip

    def restrict(self, free: Sequence[int], given: Sequence[int]) -> "Standardizer":
        """Of a joint model, whose theta are all tokens and which has no x: for drawing the tokens `free` where those of `given` are."""
        f, g = list(free), list(given)
        channels = self.theta_mean.shape[1]
        n_free, n_given = len(f) * channels, len(g) * channels
        part = lambda array, rows: np.asarray(array)[rows]  # noqa: E731
        floors = {} if self.floor is None else {"floor": part(self.floor, f), "x_floor": part(self.floor, g)}
        floors |= {} if self.edges is None else {"edges": part(self.edges, f), "x_edges": part(self.edges, g)}
        eye = np.eye(n_free, dtype=np.float32)
        return dataclasses.replace(
            self,
            kinds=tuple(self.kinds[i] for i in f), low=part(self.low, f), high=part(self.high, f),
            theta_mean=part(self.theta_mean, f), theta_std=part(self.theta_std, f),
            x_mean=part(self.theta_mean, g), x_std=part(self.theta_std, g),
            slope=np.zeros((n_given, n_free), np.float32), root=eye, inverse_root=eye,
            x_kinds=tuple(self.kinds[i] for i in g), x_low=part(self.low, g), x_high=part(self.high, g), **floors,
        )  # fmt: skip

    def unbound(self, theta: Float[Array, "... dim_theta ch_theta"]) -> Float[Array, "... dim_theta ch_theta"]:
        """theta on the real line, before z-scoring."""
        return _unbound(theta, self.kinds, self.low, self.high, self.floor, self.edges)

    def centre(self, x: Float[Array, "... dim_x ch_x"]) -> Float[Array, "... dim_theta ch_theta"]:
        """A x: where least squares puts the z-scored theta of each observation, a missing x (NaN) being at its mean. Once per
        observation, like an encoding."""
        z = self.forward_x(x)
        flat = _product(jnp.where(jnp.isnan(z), 0.0, z).reshape(*x.shape[:-2], -1), self.slope)
        return flat.reshape(*x.shape[:-2], *self.theta_mean.shape)

    def forward(
        self, theta: Float[Array, "... dim_theta ch_theta"], centre: Float[Array, "... dim_theta ch_theta"]
    ) -> Float[Array, "... dim_theta ch_theta"]:
        """theta as the network sees it, given the `centre` of its observation."""
        return _mix((self.unbound(theta) - self.theta_mean) / self.theta_std - centre, self.inverse_root)

    def inverse(
        self, y: Float[Array, "... dim_theta ch_theta"], centre: Float[Array, "... dim_theta ch_theta"]
    ) -> Float[Array, "... dim_theta ch_theta"]:
        """theta inside its support from what the network sees."""
        u = self._unmixed(y, centre)
        theta = u
        if INTERVAL in self.kinds:  # from the nearer bound, for numbers near 0 are finer than those near 1
            away = self._width() * ndtr(-jnp.abs(u))
            theta = jnp.where(self._is(INTERVAL), jnp.where(u < 0, self.low + away, self.high - away), theta)
        if DECADES in self.kinds:
            low, ratio = self._decades()
            theta = jnp.where(self._is(DECADES), low * jnp.exp(ratio * ndtr(u)), theta)
        if ABOVE in self.kinds:
            theta = jnp.where(self._is(ABOVE), self.low + jnp.exp(jnp.clip(u, -_LOG_RANGE, _LOG_RANGE)), theta)
        if BELOW in self.kinds:
            theta = jnp.where(self._is(BELOW), self.high - jnp.exp(jnp.clip(-u, -_LOG_RANGE, _LOG_RANGE)), theta)
        if set(self.kinds) <= {REAL}:
            return theta
        # at least one float inside: rounding ends on bounds, which an open interval has not
        least = jnp.where(self._is(INTERVAL, DECADES, ABOVE), _next(self.low, 1.0), -jnp.inf)
        most = jnp.where(self._is(INTERVAL, DECADES, BELOW), _next(self.high, -1.0), jnp.inf)
        return jnp.clip(theta, least, most)

    def spread(self, theta: Float[Array, "... dim_theta ch_theta"]) -> Float[Array, "... dim_theta ch_theta"]:
        """What a standard deviation of y = N(0, 1), all that x does not say linearly, is in units of theta, near each theta."""
        z = (self.unbound(theta) - self.theta_mean) / self.theta_std
        sd = jnp.sqrt(jnp.sum(jnp.square(self.root), axis=1)).reshape(self.theta_mean.shape)
        nothing = jnp.zeros_like(z)
        return (self.inverse(nothing, z + sd) - self.inverse(nothing, z - sd)) / 2

    def log_det(
        self, y: Float[Array, "... dim_theta ch_theta"], centre: Float[Array, "... dim_theta ch_theta"]
    ) -> Float[Array, "..."]:
        """log|dy/dtheta| over all parameters, at the theta that `y` stands for."""
        u = self._unmixed(y, centre)
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
        return jnp.sum(per - jnp.log(self.theta_std), axis=(-2, -1)) + jnp.linalg.slogdet(self.inverse_root)[1]

    def _unmixed(self, y: Array, centre: Array) -> Array:
        return (_mix(y, self.root) + centre) * self.theta_std + self.theta_mean

    def contains(self, theta: Float[Array, "... dim_theta ch_theta"]) -> Array:
        """Whether theta lies inside the support, over all parameters: bool [...]."""
        below = self._is(INTERVAL, DECADES, ABOVE) & (theta < self.low)
        above = self._is(INTERVAL, DECADES, BELOW) & (theta > self.high)
        return ~jnp.any(below | above, axis=(-2, -1))

    def forward_x(self, x: Float[Array, "... dim_x ch_x"]) -> Float[Array, "... dim_x ch_x"]:
        """x as the network sees it."""
        if self.x_low is not None and self.x_high is not None:
            x = _unbound(x, self.x_kinds, self.x_low, self.x_high, self.x_floor, self.x_edges)
        return (x - self.x_mean) / self.x_std

    def _is(self, *kinds: str) -> np.ndarray:
        return _is(self.kinds, *kinds)

    def _width(self) -> Array:
        return jnp.where(self._is(INTERVAL), self.high - self.low, 1.0)

    def _decades(self) -> tuple[Array, Array]:
        return _decades(self.kinds, self.low, self.high)

    @property
    def supports(self) -> list[Support]:
        """Where the parameters live."""
        low = np.where(self._is(INTERVAL, DECADES, ABOVE), self.low, -np.inf).ravel().tolist()
        high = np.where(self._is(INTERVAL, DECADES, BELOW), self.high, np.inf).ravel().tolist()
        return [Support(*bounds) for bounds in zip(low, high, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: list(value) if name in ("kinds", "x_kinds") else np.asarray(value).tolist()
            for name, value in fields.items()
            if value is not None and not (isinstance(value, tuple) and not value)
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        arrays = {
            name: tuple(value) if name in ("kinds", "x_kinds") else np.asarray(value, np.float32)
            for name, value in fields.items()
        }
        if not fields["x_mean"]:  # a list keeps no shape of nothing
            none = np.zeros((0, len(fields["theta_mean"][0])), np.float32)
            arrays |= {"x_mean": none, "x_std": none, "slope": np.zeros((0, len(fields["root"])), np.float32)}
        return cls(**arrays)  # type: ignore[arg-type]


def _is(kinds: tuple[str, ...], *wanted: str) -> np.ndarray:
    return np.asarray([[k in wanted] for k in kinds]).reshape(-1, 1)


def _next(bound: Array, direction: float) -> Array:
    """The next float32 in a direction, past 0 the next that no device takes for 0."""
    near = jnp.nextafter(bound, jnp.full_like(bound, direction * jnp.inf))
    return jnp.where(jnp.abs(near) < _TINY, direction * _TINY, near)


def _decades(kinds: tuple[str, ...], low: Array, high: Array) -> tuple[Array, Array]:
    """(low, log(high / low)) of the intervals over decades; (1, 1) of others."""
    which = _is(kinds, DECADES)
    return jnp.where(which, low, 1.0), jnp.where(which, jnp.log(high) - jnp.log(low), 1.0)


def _unbound(
    theta: Array, kinds: tuple[str, ...], low: Array, high: Array, floor: Array | None, edges: Array | None
) -> Array:
    """theta on the real line."""
    u = theta
    first, last = (_EDGE, _EDGE) if edges is None else (edges[:, :1], edges[:, 1:])

    def probit(part: Array, rest: Array) -> Array:
        """Of a part of an interval and of the rest, either finer than the other near its end."""
        return jnp.where(part < rest, ndtri(jnp.maximum(part, first)), -ndtri(jnp.maximum(rest, last)))

    if INTERVAL in kinds:
        width = jnp.where(_is(kinds, INTERVAL), high - low, 1.0)
        u = jnp.where(_is(kinds, INTERVAL), probit((theta - low) / width, (high - theta) / width), u)
    if DECADES in kinds:
        start, ratio = _decades(kinds, low, high)
        part = (jnp.log(jnp.maximum(theta, start)) - jnp.log(start)) / ratio
        u = jnp.where(_is(kinds, DECADES), probit(part, 1 - part), u)
    least = _TINY if floor is None else floor
    if ABOVE in kinds or POSITIVE in kinds:
        u = jnp.where(_is(kinds, ABOVE, POSITIVE), jnp.log(jnp.maximum(theta - low, least)), u)
    if BELOW in kinds:
        u = jnp.where(_is(kinds, BELOW), -jnp.log(jnp.maximum(high - theta, least)), u)
    return u


def _mix(y: Float[Array, "... dim_theta ch_theta"], matrix: Array) -> Float[Array, "... dim_theta ch_theta"]:
    """A symmetric matrix applied to the parameters."""
    return _product(y.reshape(*y.shape[:-2], -1), matrix).reshape(y.shape)


def _product(a: Array, b: Array) -> Array:
    """a @ b in full float32 on every kind of device: a narrow posterior would show the rounding of the fast modes."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _over_decades(theta: np.ndarray, support: Support) -> bool:
    """Whether the logarithm of a parameter in an interval fills its interval more evenly than the parameter does, by their medians."""
    low, high = np.float32(support.low), np.float32(support.high)
    if support.kind != INTERVAL or not low >= _TINY or high < _DECADES * low:
        return False
    median = np.median(theta, axis=0).clip(low, high).astype(np.float64)
    linear, decades = (median - low) / (high - low), np.log(median / low) / np.log(high / low)
    return bool(np.all(abs(decades - 0.5) < abs(linear - 0.5)))


def _over_x_decades(x: np.ndarray) -> dict[str, Any]:
    """The fields of x for entries that are positive and span decades; none where there are none."""
    some = x[np.linspace(0, len(x) - 1, min(len(x), _X_ROWS)).round().astype(int)] if len(x) else x
    if not some.size:
        return {}
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # an entry that is always missing
        few, middle, many = np.nanquantile(some, (0.05, 0.5, 0.95), axis=0)
        # the median in the lower three quarters of the logarithms: not a few small numbers among others that are alike
        over = (np.nanmin(x, axis=0) > 0) & (many >= _X_DECADES * few) & (middle / few < (many / few) ** 0.75)
    which = over.all(-1)
    if not which.any():
        return {}
    zero = np.zeros((len(which), 1), np.float32)
    kinds = tuple(POSITIVE if positive else REAL for positive in which)
    return {
        "x_kinds": kinds,
        "x_low": zero,
        "x_high": zero,
        "x_floor": _floors(np.asarray(x, np.float32), kinds, zero, zero),
    }


def _edges(
    theta: np.ndarray, kinds: tuple[str, ...], low: np.ndarray, high: np.ndarray
) -> Float[np.ndarray, "dim_theta 2"]:
    """The smallest distances from both bounds of each interval, in parts of its width: _EDGE, and less where many lie that near."""
    edges = np.full((len(kinds), 2), _EDGE, np.float32)
    for i, kind in enumerate(kinds):
        if kind == INTERVAL:
            for side, distance in enumerate((theta[:, i] - low[i], high[i] - theta[:, i])):
                median, spread = _spread(distance / (high[i] - low[i]))
                edges[i, side] = _EDGE if spread > _FLOOR else min(_EDGE, max(_TINY, median * spread))
    return edges


def _floors(
    theta: np.ndarray, kinds: tuple[str, ...], low: np.ndarray, high: np.ndarray
) -> Float[np.ndarray, "dim_theta 1"]:
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


def _least_squares(
    u: np.ndarray, u_scales: tuple[np.ndarray, np.ndarray], x: np.ndarray, x_scales: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(A', S^(1/2), S^(-1/2)) of u [n, ...] on x [n, ...], z-scored with (means, standard deviations) and flattened; no slope where there
    are too few rows for the columns."""
    n, columns, wanted = len(u), x[:1].size, u[:1].size
    slope = np.zeros((columns, wanted))

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for part in _parts(u, x):
            yield _scored(u[part], *u_scales), _scored(x[part], *x_scales)

    if columns <= min(_MOST_COLUMNS, n // _ROWS_PER_COLUMN):
        gram, cross = np.zeros((columns, columns)), np.zeros((columns, wanted))
        for u_block, x_block in blocks():
            gram += x_block.T @ x_block
            cross += x_block.T @ u_block
        slope = np.linalg.solve(gram / n + _RIDGE * np.eye(columns), cross / n)
    total, squares = np.zeros(wanted), np.zeros((wanted, wanted))
    for u_block, x_block in blocks():
        rest = u_block - x_block @ slope
        total += rest.sum(0)
        squares += rest.T @ rest
    covariance = squares / n - np.outer(total / n, total / n)
    if n < _ROWS_PER_COLUMN * len(covariance):
        covariance = np.diag(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance)
    scales = np.maximum(np.sqrt(np.maximum(values, 0.0)), _SMALLEST)
    return slope, (vectors * scales) @ vectors.T, (vectors / scales) @ vectors.T


def _scored(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Float[np.ndarray, "rows columns"]:
    """z-scored in float64; what is missing (NaN) is at the mean."""
    return np.nan_to_num((np.asarray(values, np.float64) - mean) / std).reshape(len(values), -1)


def _scales(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(means, standard deviations) over the rows without what is missing (NaN), float64: mean 0 where all is, deviation 1 for a constant
    column."""
    count, total, largest, squares = (np.zeros(values.shape[1:]) for _ in range(4))
    for part in _parts(values):
        block = np.asarray(values[part], np.float64)
        there = ~np.isnan(block)
        count += there.sum(0)
        total += np.where(there, block, 0.0).sum(0)
        largest = np.maximum(largest, np.where(there, np.abs(block), 0.0).max(0))
    mean = total / np.maximum(count, 1)
    for part in _parts(values):
        squares += np.sum(np.nan_to_num(np.asarray(values[part], np.float64) - mean) ** 2, 0)
    std = np.sqrt(squares / np.maximum(count, 1))
    constant = std <= 1e-7 * largest  # relative: a column of 1e-21 is data too
    return mean, np.where(constant, 1.0, std)


def _parts(*arrays: np.ndarray) -> list[slice]:
    """Blocks of rows that are small in float64: of all rows at once the copies would be many times the data."""
    rows = max(1, _BLOCK_BYTES // max(1, 8 * sum(array[:1].size for array in arrays)))
    return [slice(start, start + rows) for start in range(0, len(arrays[0]), rows)]
