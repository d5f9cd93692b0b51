"""Flow matching along straight lines (conditional optimal transport).

    x_t = t x + (1 - t) z,    target  x - z

(Lipman et al. 2210.02747, eq. 20-23; for posteriors, Wildberger et al. 2305.17161, eq. 7). Training times are tilted
towards the data end, t = u^(1 / (1 + tilt)), where the velocity of a narrow posterior changes fastest: density
(1 + tilt) t^tilt, the power-law family of Wildberger et al., sec. 3.3. A share of them is uniform: a tilt alone hardly
trains early times (one in 3,000 below t = 0.2 at tilt 4), where the width of a broad posterior is decided.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from distsbi.methods.base import Method, Time

TIMES = ("tilted", "uniform", "logit_normal")


@dataclasses.dataclass(frozen=True)
class FlowMatching(Method):
    """Conditional optimal-transport flow matching.

    `times`: how training times are drawn, "tilted" by `tilt` >= 0, "uniform", or "logit_normal" with `logit_mean` and
    `logit_std` (Esser et al. 2403.03206, eq. 19). `uniform` in [0, 1]: share of the training times that are uniform all the
    same. `power` >= 1: the solver's grid is 1 - (1 - u)^power on uniform u, 1 is uniform; larger values put more steps near
    the data. `scale_input`: the network is given x_t at unit variance; else x_t itself, as GenSBI's models are.
    """

    tilt: float = 4.0
    uniform: float = 0.25
    power: float = 2.5
    times: str = "tilted"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    scale_input: bool = True

    predicts_velocity: ClassVar[bool] = True
    straight: ClassVar[bool] = True
    density_steps: ClassVar[int] = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times not in TIMES:
            raise ValueError(f"FlowMatching.times must be one of {', '.join(TIMES)}; got {self.times!r}.")
        if not self.logit_std > 0:
            raise ValueError(f"FlowMatching.logit_std must be positive; got {self.logit_std}.")
        if not self.tilt >= 0 or not self.power >= 1 or not 0 <= self.uniform <= 1:
            raise ValueError(
                f"FlowMatching needs tilt >= 0, 0 <= uniform <= 1 and power >= 1; got {self.tilt}, {self.uniform} and {self.power}."
            )

    def alpha(self, t: Time) -> Time:
        return t

    def sigma(self, t: Time) -> Time:
        return 1.0 - t

    def d_alpha(self, t: Time) -> Time:
        return jnp.ones_like(t)

    def d_sigma(self, t: Time) -> Time:
        return -jnp.ones_like(t)

    def target(self, t: Time) -> tuple[Time, Time]:
        return jnp.ones_like(t), -jnp.ones_like(t)

    def draw_times(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Time:
        key_u, key_share = jax.random.split(key)
        u = jax.random.uniform(key_u, shape, jnp.float32)
        if self.times == "uniform":
            return u
        if self.times == "logit_normal":
            drawn = jax.nn.sigmoid(self.logit_mean + self.logit_std * jax.scipy.special.ndtri(u))
        else:
            drawn = u ** (1.0 / (1.0 + self.tilt))
        plain = jax.random.uniform(key_share, shape, jnp.float32) < self.uniform
        return jnp.where(plain, u, drawn)

    def c_in(self, t: Time) -> Time:
        return super().c_in(t) if self.scale_input else jnp.ones_like(t)

    def time_at(self, tau: Time) -> Time:
        return tau

    def diffusion2(self, t: Time) -> Time:
        """2 sigma / alpha, that of the forward SDE, with alpha bounded below by 0.1: it is infinite where the path is pure noise."""
        return 2.0 * (1.0 - t) / jnp.maximum(t, 0.1)

    def grid(self, steps: int) -> tuple[float, ...]:
        return tuple(1.0 - (1.0 - i / steps) ** self.power for i in range(steps + 1))
