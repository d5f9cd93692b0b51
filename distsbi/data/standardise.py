"""Standardisation is part of the model: the network sees unbounded, z-scored parameters and z-scored data.

Parameters go through an elementwise bijection of the prior's support to the real line (`distsbi.data.bijection`), then z-scoring, so that no
draw leaves the prior or lies on a bound of it, and log|du/dtheta| enters the log-density. A uniform prior becomes a standard normal, the very
distribution that the path starts from. Entries of x that are positive and span decades, such as fluxes, are taken by their logarithm. What x
says linearly is then taken out in closed form,

    y = S^(-1/2) (u - A x),    A: least squares of u on x,    S: covariance of what is left

(u and x z-scored), so the network learns the shape of a posterior that is centred and of unit scale already, and the
posterior of a linear-Gaussian problem is the very noise that the path starts from.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distsbi.data.bijection import Bijection, Support

_ROWS_PER_COLUMN = 10  # pairs for each column of x below which least squares would fit noise
_MOST_COLUMNS = 2_048
_SMALLEST = 1e-3  # of the scales S^(1/2): a parameter that x fixes linearly keeps a scale
_RIDGE = 1e-6
_BLOCK_BYTES = 16 * 2**20  # of float64 rows that scales are summed over at a time
_OF_BIJECTION = [field.name for field in dataclasses.fields(Bijection)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Standardizer:
    """Bijection and scales of theta [dim_theta, ch_theta], scales of x [dim_x, ch_x], least squares between the two, with
    both sides flattened. A pytree."""

    bijection: Bijection  # of theta
    theta_mean: Float[Array, "dim_theta ch_theta"]
    theta_std: Float[Array, "dim_theta ch_theta"]
    x_mean: Float[Array, "dim_x ch_x"]
    x_std: Float[Array, "dim_x ch_x"]
    slope: Float[Array, "n_x n_theta"]  # A, transposed
    root: Float[Array, "n_theta n_theta"]  # S^(1/2), symmetric
    inverse_root: Float[Array, "n_theta n_theta"]
    x_bijection: Bijection | None = (
        None  # of parameters that a joint model is given, and of x over decades; None: x is real
    )

    @classmethod
    def fit(
        cls,
        theta: Float[np.ndarray, "n dim_theta ch_theta"],
        x: Float[np.ndarray, "n dim_x ch_x"],
        supports: Sequence[Support],
        *,
        linear: bool = True,
        decades: bool = True,
        pool: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
        exchangeable: bool = False,
    ) -> Self:
        """Scales from training pairs. A constant column keeps its mean and gets scale 1. `linear`: with least squares. `decades`: the logarithm of
        entries of x that are positive and span decades. `pool`: makes the means and standard deviations of x, of so many rows each, equal where entries share a scale (0 for a constant).
        `exchangeable`: the entries of x are a set: they share all scales, and least squares is on their sum.

        Raises ValueError if there are not as many supports as parameters.
        """
        if len(supports) != theta.shape[1]:
            raise ValueError(f"the prior has {len(supports)} parameters, theta has {theta.shape[1]}.")
        theta, x = np.asarray(theta, np.float32), np.asarray(x)
        bijection = Bijection.of_parameters(theta, supports)
        n, size = x.shape[:2]
        if exchangeable:  # one entry, of so many more observations
            x = x.reshape(n * size, 1, -1)
        x_bijection = Bijection.of_data(x) if decades else None
        u, x = _unbounded(theta, bijection), x if x_bijection is None else _unbounded(x, x_bijection)
        _, mean, std = _moments(u)
        count, x_mean, x_std = _moments(x)
        if pool is not None:
            x_mean, x_std = pool(count, x_mean, x_std)
        std, x_std = (np.where(scale > 0, scale, 1.0) for scale in (std, x_std))
        if exchangeable:
            x = x.reshape(n, size, -1)
            x = np.concatenate(
                [_scored(x[part], x_mean, x_std).reshape(-1, *x.shape[1:]).mean(1) for part in _parts(x)]
            )
        eye = np.eye(mean.size, dtype=np.float32)
        slope, root, inverse_root = np.zeros((x_mean.size, mean.size)), eye, eye
        if linear:
            slope, root, inverse_root = _least_squares(
                u, (mean, std), x, (0.0, 1.0) if exchangeable else (x_mean, x_std)
            )
        if exchangeable:
            x_bijection = None if x_bijection is None else x_bijection.rows([0] * size)
            x_mean, x_std, slope = (np.tile(a, (size, 1)) for a in (x_mean, x_std, slope / size))
        arrays: Any = (mean, std, x_mean, x_std, slope, root, inverse_root)
        return cls(bijection, *(array.astype(np.float32) for array in arrays), x_bijection=x_bijection)

    @classmethod
    def identity(cls, dim_theta: int, dim_x: int, ch_theta: int = 1, ch_x: int = 1) -> Self:
        """For parameters and data that are on the network's scale already."""

        def array(value: float, *shape: int) -> Any:
            return np.full(shape, value, np.float32)

        n = dim_theta * ch_theta
        eye: Any = np.eye(n, dtype=np.float32)
        return cls(
            Bijection.identity(dim_theta), array(0, dim_theta, ch_theta), array(1, dim_theta, ch_theta),
            array(0, dim_x, ch_x), array(1, dim_x, ch_x), array(0, dim_x * ch_x, n), eye, eye,
        )  # fmt: skip

    def restrict(self, free: Sequence[int], given: Sequence[int]) -> "Standardizer":
        """Of a joint model, whose theta are all tokens and which has no x: for drawing the tokens `free` where those of `given` are."""
        mean, std = np.asarray(self.theta_mean), np.asarray(self.theta_std)
        f, g, channels = list(free), list(given), mean.shape[1]
        eye: Any = np.eye(len(f) * channels, dtype=np.float32)
        slope: Any = np.zeros((len(g) * channels, len(f) * channels), np.float32)
        x_bijection = self.bijection.rows(g)
        return type(self)(self.bijection.rows(f), mean[f], std[f], mean[g], std[g], slope, eye, eye, x_bijection)  # type: ignore[arg-type]

    def unbound(self, theta: Float[Array, "... dim_theta ch_theta"]) -> Float[Array, "... dim_theta ch_theta"]:
        """theta on the real line, before z-scoring."""
        return self.bijection.forward(theta)

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
        return self.bijection.inverse(self._unmixed(y, centre))

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
        per = self.bijection.log_det(self._unmixed(y, centre))
        return jnp.sum(per - jnp.log(self.theta_std), axis=(-2, -1)) + jnp.linalg.slogdet(self.inverse_root)[1]

    def _unmixed(self, y: Array, centre: Array) -> Array:
        return (_mix(y, self.root) + centre) * self.theta_std + self.theta_mean

    def forward_x(self, x: Float[Array, "... dim_x ch_x"], xp: Any = jnp) -> Float[Array, "... dim_x ch_x"]:
        """x as the network sees it. `xp`: as for `Bijection.forward`."""
        if self.x_bijection is not None:
            x = self.x_bijection.forward(x, xp)
        return (x - self.x_mean) / self.x_std

    def inverse_x(self, z: Float[Array, "... dim_x ch_x"]) -> Float[Array, "... dim_x ch_x"]:
        """The x that the network sees as z."""
        x = self.x_mean + self.x_std * z
        return x if self.x_bijection is None else self.x_bijection.inverse(x)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, the fields of the bijections beside the others."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.endswith("bijection")}
        for prefix, bijection in (("", self.bijection), ("x_", self.x_bijection)):
            fields |= {prefix + name: getattr(bijection, name, None) for name in _OF_BIJECTION}
        return {
            name: list(value) if isinstance(value, tuple) else np.asarray(value).tolist()
            for name, value in fields.items()
            if value is not None and not (isinstance(value, tuple) and not value)
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        arrays: dict[str, Any] = {
            name: tuple(value) if name in ("kinds", "x_kinds") else np.asarray(value, np.float32)
            for name, value in fields.items()
        }
        if not fields["x_mean"]:  # a list keeps no shape of nothing
            none = np.zeros((0, len(fields["theta_mean"][0])), np.float32)
            arrays |= {"x_mean": none, "x_std": none, "slope": np.zeros((0, len(fields["root"])), np.float32)}
        of_theta, of_x = (
            {name: arrays.pop(prefix + name) for name in _OF_BIJECTION if prefix + name in arrays}
            for prefix in ("", "x_")
        )
        # of x without entries there is no list of kinds
        return cls(Bijection(**of_theta), **arrays, x_bijection=Bijection(**{"kinds": (), **of_x}) if of_x else None)


def _mix(y: Float[Array, "... dim_theta ch_theta"], matrix: Array) -> Float[Array, "... dim_theta ch_theta"]:
    """A symmetric matrix applied to the parameters."""
    return _product(y.reshape(*y.shape[:-2], -1), matrix).reshape(y.shape)


def _product(a: Array, b: Array) -> Array:
    """a @ b in full float32 on every kind of device: a narrow posterior would show the rounding of the fast modes."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _least_squares(
    u: np.ndarray, u_scales: tuple[Any, Any], x: np.ndarray, x_scales: tuple[Any, Any]
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


def _unbounded(values: np.ndarray, bijection: Bijection) -> np.ndarray:
    """values [n, ...] on the real line, block by block: all of them need not fit on a device."""
    return np.concatenate(
        [np.asarray(_forward(bijection, np.asarray(values[part], np.float32))) for part in _parts(values)]
    )


@jax.jit
def _forward(bijection: Bijection, values: Array) -> Array:
    """One program instead of one for each of its operations."""
    return bijection.forward(values)


def _scored(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> Float[np.ndarray, "rows columns"]:
    """z-scored in float64; what is missing (NaN) is at the mean."""
    return np.nan_to_num((np.asarray(values, np.float64) - mean) / std).reshape(len(values), -1)


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, means, standard deviations) without what is missing (NaN), float64: mean 0 where all is, deviation 0 for a constant column."""
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
    return count, mean, np.where(constant, 0.0, std)


def _parts(*arrays: np.ndarray) -> list[slice]:
    """Blocks of rows that are small in float64: of all rows at once the copies would be many times the data."""
    rows = max(1, _BLOCK_BYTES // max(1, 8 * sum(array[:1].size for array in arrays)))
    return [slice(start, start + rows) for start in range(0, len(arrays[0]), rows)]
