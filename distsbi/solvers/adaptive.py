"""Adaptive Runge-Kutta solvers from diffrax.

Every draw chooses its own steps, so its result does not depend on which other draws share its tile (but for methods whose functions of
time are not rational, EDM and score matching, one device and many agree within the tolerances only); or (`coupled`) the draws
of a tile share their steps, which is faster and depends on the tile.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from distsbi.hints import as_count, as_number
from distsbi.methods import Method, Moment
from distsbi.solvers.field import Field, WithDivergence

SOLVERS = {"tsit5": "Tsit5", "dopri5": "Dopri5", "dopri8": "Dopri8"}
MAX_STEPS = 4_096


@dataclasses.dataclass(frozen=True)
class _WithVolume(Field):
    """The field of (y, the integral of div v)."""

    both: WithDivergence

    def velocity(self, m: Moment, y: tuple[Array, Array], context: Any) -> tuple[Array, Array]:
        return self.both(m, y[0], context)


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A diffrax solver with its tolerances.

    `coupled`: one error control for all draws of a tile. Draws then depend, within the tolerances, on what shares their tile.

    Raises ValueError for an unknown solver or tolerances that are not positive.
    """

    name: str = "tsit5"
    rtol: float = 1e-5
    atol: float = 1e-5
    coupled: bool = False
    max_steps: int = MAX_STEPS

    stochastic: ClassVar[bool] = False
    gives_density: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"unknown solver {self.name!r}; known are {', '.join(SOLVERS)}.")
        for name in ("rtol", "atol"):
            object.__setattr__(self, name, as_number(name, getattr(self, name)))
        object.__setattr__(self, "max_steps", as_count("max_steps", self.max_steps))
        if not (0 < self.rtol < math.inf and 0 < self.atol < math.inf):
            raise ValueError(f"rtol and atol must be positive and finite; got {self.rtol} and {self.atol}.")

    @property
    def evaluations(self) -> None:
        """Not known before the solve."""
        return None

    def refined(self) -> "Adaptive":
        """Tolerances of a tenth."""
        return dataclasses.replace(self, rtol=self.rtol / 10, atol=self.atol / 10)

    def schedule(self, method: Method, *, reverse: bool = False) -> None:
        """Nothing: the times are not known before."""

    def volume_schedule(self, method: Method, *, reverse: bool = False) -> None:
        """Nothing either."""

    def solve(
        self,
        field: Field,
        y: Any,
        context: Any,
        noise: Any = None,
        *,
        schedule: Any = None,
        reverse: bool = False,
        trajectory: bool = False,
    ) -> Any:
        """y at t = 1 from y at 0, or `reverse`; y: an array, or a pytree of them, [slots, draws, ...].

        A draw that needs more than `max_steps` becomes NaN. Raises ValueError for `trajectory`.
        """
        import diffrax

        if trajectory:
            raise ValueError(f"{self.name} chooses its own times; for a trajectory give steps or step_size.")
        control = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        solver = getattr(diffrax, SOLVERS[self.name])()
        start, stop = (1.0, 0.0) if reverse else (0.0, 1.0)

        def solve(derivative: Callable[[Any, Any, Any], Any], y: Any, context: Any) -> Any:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(derivative), solver, start, stop, None, y, context,  # type: ignore[arg-type]
                stepsize_controller=control, max_steps=self.max_steps, throw=False,
            )  # fmt: skip
            done = solution.result == diffrax.RESULTS.successful
            return jax.tree.map(lambda a: jnp.where(done, a[0], jnp.nan), solution.ys)

        if self.coupled:
            return solve(lambda t, y, c: field.velocity(field.method.moment(jnp.asarray(t)), y, c), y, context)
        alone = lambda tree, axes: jax.tree.map(lambda a: a[(None,) * axes], tree)  # noqa: E731

        def one(y: Any, context: Any) -> Any:
            derivative = lambda t, y, c: jax.tree.map(  # noqa: E731
                lambda a: a[0, 0], field.velocity(field.method.moment(jnp.asarray(t)), alone(y, 2), alone(c, 1))
            )
            return solve(derivative, y, context)

        return jax.vmap(jax.vmap(one, in_axes=(0, None)))(y, context)

    def solve_with_volume(
        self, field: Field, both: WithDivergence, y: Array, context: Any, *, schedule: Any = None, reverse: bool = False
    ) -> tuple[Array, Array]:
        """(y at t = 1 from y at 0, or `reverse`; the integral of div v up to it [slots, draws]), under one error control. `both`: of `field`."""
        joined = _WithVolume(field.predict, field.method, both)
        return self.solve(joined, (y, jnp.zeros(y.shape[:2], y.dtype)), context, reverse=reverse)

    def to_dict(self) -> dict[str, Any]:
        most = {} if self.max_steps == MAX_STEPS else {"max_steps": self.max_steps}
        return {"solver": self.name, "rtol": self.rtol, "atol": self.atol, "coupled": self.coupled, **most}
