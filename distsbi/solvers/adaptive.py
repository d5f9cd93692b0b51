"""Adaptive Runge-Kutta solvers from diffrax, one error control per draw.

Every draw chooses its own steps, so its result does not depend on which other draws share its tile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

SOLVERS = {"tsit5": "Tsit5", "dopri5": "Dopri5", "dopri8": "Dopri8"}


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A diffrax solver with its tolerances, from t = 0 to `t_end`.

    Raises ValueError for an unknown solver or tolerances that are not positive.
    """

    name: str = "tsit5"
    rtol: float = 1e-5
    atol: float = 1e-5
    t_end: float = 1.0
    max_steps: int = 4096

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"unknown solver {self.name!r}; known are {', '.join(SOLVERS)}.")
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive; got {self.rtol} and {self.atol}.")

    @property
    def evaluations(self) -> None:
        """Not known before the solve."""
        return None

    def solve(self, velocity: Callable[[Array, Array, Any], Array], y: Array, context: Any) -> Array:
        """y at t_end from y at 0, [slots, draws, ...]; a draw that needs more than `max_steps` becomes NaN."""
        import diffrax

        term = diffrax.ODETerm(
            lambda t, y, c: velocity(jnp.asarray(t), y[None, None], jax.tree.map(lambda leaf: leaf[None], c))[0, 0]
        )
        control = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        solver = getattr(diffrax, SOLVERS[self.name])()

        def one(y: Array, context: Any) -> Array:
            solution = diffrax.diffeqsolve(
                term, solver, 0.0, self.t_end, None, y, context,
                stepsize_controller=control, max_steps=self.max_steps, throw=False,
            )  # fmt: skip
            done = solution.result == diffrax.RESULTS.successful
            return jnp.where(done, solution.ys[0], jnp.nan)  # type: ignore[index]

        return jax.vmap(jax.vmap(one, in_axes=(0, None)))(y, context)

    def to_dict(self) -> dict[str, Any]:
        return {"solver": self.name, "rtol": self.rtol, "atol": self.atol, "t_end": self.t_end}
