"""Score matching along the variance-preserving and the variance-exploding SDE; the network predicts the noise z.

    VP    alpha = exp(-1/2 int_0^s beta),  sigma = sqrt(1 - alpha^2),  beta(s) = beta_min + s (beta_max - beta_min)
    VE    alpha = 1,                       sigma = sigma_min (sigma_max / sigma_min)^s

(Song et al. 2011.13456, eq. 30-33; the noise as target: Ho et al. 2006.11239, eq. 14; the score is -z / sigma.) s runs
from the data; our time t, from the noise, is 1 at the smallest s that is trained.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from distsbi.methods.base import Method, Time, karras


@dataclasses.dataclass(frozen=True)
class ScoreMatchingVP(Method):
    """Variance-preserving score matching.

    `beta_min`, `beta_max`: the noise schedule. `eps`: the smallest s. Song et al. train to 1e-5 and stop sampling at 1e-3,
    where a noise of 0.01 standard deviations is left; posteriors may be as narrow as that, so both are 1e-5 here.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    eps: float = 1e-5

    denoises: ClassVar[bool] = True
    density_steps: ClassVar[int] = 56

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_min < self.beta_max or not 0 < self.eps < 1:
            raise ValueError(
                f"ScoreMatchingVP needs 0 < beta_min < beta_max and 0 < eps < 1; got {self.beta_min}, {self.beta_max} and {self.eps}."
            )

    def _s(self, t: Time) -> Time:
        return (1.0 - t) + t * self.eps

    def _integral(self, s: Any) -> Any:
        """int_0^s beta."""
        return s * (self.beta_min + 0.5 * s * (self.beta_max - self.beta_min))

    def _time(self, ratio: Any, xp: Any) -> Any:
        """The time t where sigma / alpha is `ratio`; `xp`: jax's numpy, or numpy itself for float64."""
        integral, slope = xp.log1p(ratio**2), self.beta_max - self.beta_min
        # s from beta_min s + slope s^2 / 2 = integral, in the form that does not cancel
        s = 2.0 * integral / (self.beta_min + xp.sqrt(self.beta_min**2 + 2.0 * slope * integral))
        return (1.0 - s) / (1.0 - self.eps)

    def _beta(self, t: Time) -> Time:
        """-d/dt of the integral."""
        return (1.0 - self.eps) * (self.beta_min + self._s(t) * (self.beta_max - self.beta_min))

    def alpha(self, t: Time) -> Time:
        return jnp.exp(-0.5 * self._integral(self._s(t)))

    def sigma(self, t: Time) -> Time:
        return jnp.sqrt(-jnp.expm1(-self._integral(self._s(t))))

    def d_alpha(self, t: Time) -> Time:
        return 0.5 * self._beta(t) * self.alpha(t)

    def d_sigma(self, t: Time) -> Time:
        return -0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def target(self, t: Time) -> tuple[Time, Time]:
        return jnp.zeros_like(t), jnp.ones_like(t)

    def draw_times(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Time:
        return jax.random.uniform(key, shape, jnp.float32)

    def time_at(self, tau: Time) -> Time:
        return jnp.clip(self._time((1.0 - tau) / tau, jnp), 0.0, 1.0)

    def grid(self, steps: int) -> tuple[float, ...]:
        """Karras' grid of noise ratios, in the times of this path."""
        first, last = (math.sqrt(math.expm1(self._integral(s))) for s in (1.0, self.eps))
        times = self._time(karras(np.linspace(0.0, 1.0, steps + 1), first, last), np)
        return (0.0, *(float(t) for t in times[1:-1]), 1.0)


@dataclasses.dataclass(frozen=True)
class ScoreMatchingVE(Method):
    """Variance-exploding score matching. `sigma_min` < `sigma_max`: the noise at t = 1 and at t = 0. Song et al. take 0.01 for images; posteriors
    may be narrower, so it is EDM's 0.002 here."""

    sigma_min: float = 0.002
    sigma_max: float = 50.0

    denoises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"ScoreMatchingVE needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}."
            )

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_min / self.sigma_max)

    def alpha(self, t: Time) -> Time:
        return jnp.ones_like(t)

    def sigma(self, t: Time) -> Time:
        return self.sigma_max * jnp.exp(t * self._log_range)

    def d_alpha(self, t: Time) -> Time:
        return jnp.zeros_like(t)

    def d_sigma(self, t: Time) -> Time:
        return self._log_range * self.sigma(t)

    def target(self, t: Time) -> tuple[Time, Time]:
        return jnp.zeros_like(t), jnp.ones_like(t)

    def draw_times(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Time:
        return jax.random.uniform(key, shape, jnp.float32)

    def time_at(self, tau: Time) -> Time:
        return jnp.clip(jnp.log((1.0 - tau) / tau / self.sigma_max) / self._log_range, 0.0, 1.0)

    def grid(self, steps: int) -> tuple[float, ...]:
        return tuple(i / steps for i in range(steps + 1))
