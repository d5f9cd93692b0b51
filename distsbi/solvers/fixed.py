"""Fixed grids: a step rule, and one loop over the grid.

A rule writes only its step, dy/dt = v(t, y) from t0 to t1 = t0 + h, given what it remembers of the step before:

    step(v, t0, t1, y, memory) -> (y at t1, memory)

Grids are plain tuples of times, so that a solver is hashable, JSON-able and one compiled executable.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Velocity = Callable[[Array, Array], Array]
Memory = tuple[Array, Array]  # what the rule kept of the step before, and that step's length (0 before the first)


def _euler(v: Velocity, t0: Array, t1: Array, y: Array, memory: Memory) -> tuple[Array, Memory]:
    return y + (t1 - t0) * v(t0, y), memory


def _midpoint(v: Velocity, t0: Array, t1: Array, y: Array, memory: Memory) -> tuple[Array, Memory]:
    h = t1 - t0
    return y + h * v(t0 + h / 2, y + h / 2 * v(t0, y)), memory


def _heun(v: Velocity, t0: Array, t1: Array, y: Array, memory: Memory) -> tuple[Array, Memory]:
    h = t1 - t0
    k1 = v(t0, y)
    return y + h / 2 * (k1 + v(t1, y + h * k1)), memory


def _rk4(v: Velocity, t0: Array, t1: Array, y: Array, memory: Memory) -> tuple[Array, Memory]:
    h = t1 - t0
    k1 = v(t0, y)
    k2 = v(t0 + h / 2, y + h / 2 * k1)
    k3 = v(t0 + h / 2, y + h / 2 * k2)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + v(t1, y + h * k3)), memory


def _multistep(v: Velocity, t0: Array, t1: Array, y: Array, memory: Memory) -> tuple[Array, Memory]:
    """Second order, one evaluation a step: exact where the endpoint D(t) = y + (1 - t) v(t, y) is linear in t.

    For straight paths D is E[x | x_t], which varies slowly while v turns fast near the data, so D is what to extrapolate from the
    step before (as DPM-Solver++ 2M does in log-SNR, Lu et al. 2211.01095, eq. 12). With D = d0 + d1 (t - t0), dy/dt = (D - y) / (1 - t)
    has the solution D(t1) + r (y - d0) + d1 (1 - t1) log r, with r = (1 - t1) / (1 - t0). The first step is Euler's.
    """
    before, h_before = memory
    h = t1 - t0
    end = y + (1 - t0) * v(t0, y)
    slope = jnp.where(h_before > 0, (end - before) / jnp.where(h_before > 0, h_before, 1.0), 0.0)
    left = 1 - t1
    ratio = left / (1 - t0)
    log_ratio = jnp.log(jnp.maximum(ratio, jnp.finfo(jnp.float32).tiny))
    return end + slope * h + ratio * (y - end) + slope * left * log_ratio, (end, h)


RULES: dict[str, tuple[Callable, int]] = {  # name: (rule, evaluations of v per step)
    "euler": (_euler, 1),
    "midpoint": (_midpoint, 2),
    "heun": (_heun, 2),
    "rk4": (_rk4, 4),
    "multistep": (_multistep, 1),
}


@dataclasses.dataclass(frozen=True)
class FixedGrid:
    """A step rule on a grid of increasing times in [0, 1].

    Raises ValueError for an unknown rule or times that do not increase.
    """

    rule: str
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown solver {self.rule!r}; known are {', '.join(RULES)}.")
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        times = np.asarray(self.times)
        if times.size < 2 or times[0] < 0 or times[-1] > 1 or np.any(np.diff(times) <= 0):
            raise ValueError(f"a time grid needs two or more increasing times in [0, 1]; got {self.times}.")

    @property
    def evaluations(self) -> int:
        """Network evaluations per draw."""
        return RULES[self.rule][1] * (len(self.times) - 1)

    def solve(self, velocity: Callable[[Array, Array, Any], Array], y: Array, context: Any) -> Array:
        """y at the last time from y at the first. `velocity(t, y, context)` takes a scalar t."""
        rule, _ = RULES[self.rule]
        times = jnp.asarray(self.times, jnp.float32)

        def step(carry: tuple[Array, Memory], interval: tuple[Array, Array]) -> tuple[tuple[Array, Memory], None]:
            y, memory = carry
            return rule(lambda t, y: velocity(t, y, context), *interval, y, memory), None

        (y, _), _ = jax.lax.scan(step, (y, (jnp.zeros_like(y), jnp.zeros((), jnp.float32))), (times[:-1], times[1:]))
        return y

    def to_dict(self) -> dict[str, Any]:
        return {"solver": self.rule, "times": list(self.times)}
