"""EDM: additive noise, and a denoiser that is preconditioned to unit input, output and target.

    x_t = x + sigma(t) z,    sigma(t) = (sigma_max^(1/rho) + t (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    D(x_t) = c_skip x_t + c_out f(c_in x_t),    target f = (x - c_skip x_t) / c_out = a x + b z

(Karras et al. 2206.00364, eq. 5, 7 and table 1, with sigma_data = 1: the data are standardised.) Equal steps of t are the
nodes of the paper's grid (between them rules step in the straight frame, see `distsbi.solvers.field`), and E[x | x_t] at t = 1 is its last step, from sigma_min to 0.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from distsbi.methods.base import Method, Time, karras


@dataclasses.dataclass(frozen=True)
class EDM(Method):
    """EDM diffusion.

    `sigma_min` < `sigma_max`: the noise at t = 1 and t = 0. `rho`: curvature of the grid. `p_mean`, `p_std`: training noise is
    log-normal, ln sigma ~ N(p_mean, p_std^2).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2

    denoises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max or not self.rho > 0 or not self.p_std > 0:
            raise ValueError(
                f"EDM needs 0 < sigma_min < sigma_max, rho > 0 and p_std > 0; got {self.sigma_min}, {self.sigma_max}, {self.rho} and {self.p_std}."
            )

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def alpha(self, t: Time) -> Time:
        return jnp.ones_like(t)

    def sigma(self, t: Time) -> Time:
        return karras(t, self.sigma_max, self.sigma_min, self.rho)

    def d_alpha(self, t: Time) -> Time:
        return jnp.zeros_like(t)

    def d_sigma(self, t: Time) -> Time:
        first, last = self._roots
        return self.rho * (last - first) * (first + t * (last - first)) ** (self.rho - 1)

    def target(self, t: Time) -> tuple[Time, Time]:
        sigma = self.sigma(t)
        norm = jnp.sqrt(1.0 + sigma**2)
        return sigma / norm, -1.0 / norm

    def draw_times(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Time:
        return self._time(jnp.exp(self.p_mean + self.p_std * jax.random.normal(key, shape, jnp.float32)))

    def _time(self, sigma: Time) -> Time:
        first, last = self._roots
        return jnp.clip((sigma ** (1 / self.rho) - first) / (last - first), 0.0, 1.0)

    def time_at(self, tau: Time) -> Time:
        return self._time((1.0 - tau) / tau)

    def c_time(self, t: Time) -> Time:
        return jnp.log(self.sigma(t)) / 4.0

    def grid(self, steps: int) -> tuple[float, ...]:
        return tuple(i / steps for i in range(steps + 1))
