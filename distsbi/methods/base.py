"""One Gaussian path for every method.

    x_t = alpha(t) x + sigma(t) z,    z ~ N(0, I),    t from 0 (noise) to 1 (data)
    the network predicts  f = a(t) x + b(t) z

Solving these two equations gives E[x | x_t] and E[z | x_t] from a prediction of f, hence the velocity of the
probability-flow ODE, alpha'(t) E[x] + sigma'(t) E[z], and the score, -E[z] / sigma(t)
(Song et al. 2011.13456, eq. 13; Albergo & Vanden-Eijnden 2303.08797, sec. 2).
One loss, one family of solvers and one log-density serve all methods; a method writes only its coefficients.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from distsbi.hints import as_number

Time = Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """A path and a prediction target. Subclasses are final: frozen dataclasses of plain numbers, hashable and JSON-able.

    Raises ValueError for an option that is no finite number, or no truth value, where it must be one.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            what, value = f"{type(self).__name__}.{field.name}", getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{what} must be True or False; got {value!r}.")
            if field.type is float:
                number = as_number(what, value)
                if not math.isfinite(number):
                    raise ValueError(f"{what} must be finite; got {value!r}.")
                object.__setattr__(self, field.name, number)

    @abstractmethod
    def alpha(self, t: Time) -> Time:
        """Coefficient of the data."""

    @abstractmethod
    def sigma(self, t: Time) -> Time:
        """Coefficient of the noise."""

    @abstractmethod
    def d_alpha(self, t: Time) -> Time:
        """Time derivative of alpha."""

    @abstractmethod
    def d_sigma(self, t: Time) -> Time:
        """Time derivative of sigma."""

    @abstractmethod
    def target(self, t: Time) -> tuple[Time, Time]:
        """(a, b) of the prediction target f = a x + b z."""

    @abstractmethod
    def draw_times(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Time:
        """Training times in [0, 1]."""

    @abstractmethod
    def grid(self, steps: int) -> tuple[float, ...]:
        """The method's own solver grid: steps + 1 increasing times from 0 to 1."""

    @abstractmethod
    def time_at(self, tau: Time) -> Time:
        """The time t where alpha / (alpha + sigma) = tau: every path, divided by alpha + sigma, is the straight one,
        tau x + (1 - tau) z."""

    # Whether the network predicts the velocity itself: alpha' = a and sigma' = b.
    predicts_velocity: ClassVar[bool] = False
    # Whether alpha + sigma = 1 at every time: the path is straight as it is.
    straight: ClassVar[bool] = False
    # Whether noise is left at t = 1, where sigma(1) > 0 keeps the score finite, and E[x | x_1] takes it out.
    denoises: ClassVar[bool] = False
    # Steps of Runge-Kutta of order three on the method's grid for a density: where two modes part, 95 % of its errors are under about 0.01.
    density_steps: ClassVar[int] = 48

    def weight(self, t: Time) -> Time:
        """Weight of the squared error at t."""
        return jnp.ones_like(t)

    def c_in(self, t: Time) -> Time:
        """Scale of the network's input: x_t has unit variance for standardised data."""
        return 1.0 / jnp.sqrt(self.alpha(t) ** 2 + self.sigma(t) ** 2)

    def c_time(self, t: Time) -> Time:
        """The time that the network is told."""
        return t

    def diffusion2(self, t: Time) -> Time:
        """g(t)^2 of the reverse SDE dy = (v + g^2 score / 2) dt + g dW. Its marginals are those of the path for every g; this g is
        that of the forward SDE which makes the path, g^2 = 2 sigma^2 alpha' / alpha - 2 sigma sigma' (Song et al., eq. 29)."""
        sigma = self.sigma(t)
        return 2.0 * sigma**2 * self.d_alpha(t) / self.alpha(t) - 2.0 * sigma * self.d_sigma(t)

    # Shared, written once.

    def moment(self, t: Time) -> "Moment":
        """All that solvers ask of time: the inverse of [[alpha, sigma], [a, b]], and the velocity that follows from it."""
        a, b = self.target(t)
        alpha, sigma, d_alpha, d_sigma = self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)
        determinant = alpha * b - sigma * a
        x_y, x_f, z_y, z_f = b / determinant, -sigma / determinant, -a / determinant, alpha / determinant
        v_y, v_f = d_alpha * x_y + d_sigma * z_y, d_alpha * x_f + d_sigma * z_f
        if self.predicts_velocity:  # without rounding
            v_y, v_f = jnp.zeros_like(t), jnp.ones_like(t)
        return Moment(t, self.c_time(t), self.c_in(t), alpha, sigma, x_y, x_f, z_y, z_f, v_y, v_f)

    def perturb(self, t: Time, x: Array, z: Array) -> Array:
        """x_t. `t` broadcasts against x and z."""
        return self.alpha(t) * x + self.sigma(t) * z

    def goal(self, t: Time, x: Array, z: Array) -> Array:
        """What the network should predict at (t, x, z)."""
        a, b = self.target(t)
        return a * x + b * z

    def initial(self, z: Array) -> Array:
        """The state at t = 0 from standard normal noise."""
        return self.sigma(jnp.zeros((), jnp.float32)) * z

    def to_dict(self) -> dict[str, Any]:
        """The options, JSON-able."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """The method with these options. Raises ValueError naming the unknown ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"{cls.__name__} has no options {unknown}; it has {sorted(known)}.")
        try:
            return cls(**options)
        except TypeError as error:
            raise ValueError(f"an option of {cls.__name__} has a wrong type ({error}); got {options}.") from error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
    """A time t, and what a method makes of it: v = v_y y + v_f f, E[x] = x_y y + x_f f, E[z] = z_y y + z_f f at the state y with
    the prediction f; the score is -E[z] / sigma."""

    t: Array
    c_time: Array
    c_in: Array
    alpha: Array
    sigma: Array
    x_y: Array
    x_f: Array
    z_y: Array
    z_f: Array
    v_y: Array
    v_f: Array

    @property
    def scale(self) -> Array:
        """alpha + sigma: y = scale Y in the straight frame."""
        return self.alpha + self.sigma


def karras(u: Any, first: float, last: float, rho: float = 7.0) -> Any:
    """Noise ratios sigma / alpha from `first` at u = 0 down to `last` at u = 1: equal steps of u are equal steps of their rho-th root
    (Karras et al. 2206.00364, eq. 5)."""
    return (first ** (1 / rho) + u * (last ** (1 / rho) - first ** (1 / rho))) ** rho
