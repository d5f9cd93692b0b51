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
Memory = tuple[Array, Array]  # velocity at the last step's start, and its length (0 before the first step)


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
    """Adams-Bashforth of order two on an uneven grid (Hairer, Norsett & Wanner I, III.5); the first step is Euler's."""
    before, h_before = memory
    h = t1 - t0
    now = v(t0, y)
    ratio = jnp.where(h_before == 0, 0.0, h / jnp.where(h_before == 0, 1.0, h_before))
    return y + h * (now + ratio / 2 * (now - before)), (now, h)


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

        (y, _), _ = jax.lax.scan(step, (y, (jnp.zeros_like(y), jnp.zeros(()))), (times[:-1], times[1:]))
        return y

    def to_dict(self) -> dict[str, Any]:
        return {"solver": self.rule, "times": list(self.times)}
