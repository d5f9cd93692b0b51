"""Fixed grids: one loop over the times of a grid, with a rule of `rules` from each to the next.

Grids are plain tuples of times, so that a solver is hashable, JSON-able and one compiled executable.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from distsbi.hints import as_number
from distsbi.methods import Method
from distsbi.solvers import quadrature
from distsbi.solvers.field import Field, WithDivergence, known
from distsbi.solvers.rules import DENSITY_RULES, RULES, Bound, Memory, into_frame, moments, out_of_frame

AT_END = 1e-6  # how near to 1 a last time is 1: sums of float32 steps end there
Noise = Callable[[Array], Array]  # step number -> standard normal numbers of y's shape


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


def shown(times: Sequence[float]) -> str:
    """Times for a message: of many the first and the last."""
    few = [f"{float(t):.6g}" for t in times]
    return f"({', '.join(few if len(few) <= 8 else [*few[:3], '...', *few[-3:]])})"


@dataclasses.dataclass(frozen=True)
class FixedGrid:
    """A step rule on a grid of increasing times in [0, 1], the last of which is 1 where it is within rounding of it. `options`: of the rule, as (name, value) pairs; those left out have
    their defaults.

    Raises ValueError for an unknown rule or option, or times that do not increase, for rules of more than the velocity in
    float32.
    """

    rule: str
    times: tuple[float, ...]
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown solver {self.rule!r}; known are {', '.join(RULES)}.")
        given = tuple(float(t) for t in self.times)
        at_end = bool(given) and abs(given[-1] - 1) < AT_END
        object.__setattr__(self, "times", (*given[:-1], 1.0) if at_end else given)
        times = np.asarray(self.times)
        if times.size < 2 or times[0] < 0 or times[-1] > 1 or not np.all(np.diff(times) > 0):
            raise ValueError(f"a time grid needs two or more increasing times in [0, 1]; got {shown(self.times)}.")
        # a step of no length changes nothing, but a rule that divides by the noise left at its start finds none there
        if not RULES[self.rule].gives_density and np.any(np.diff(times.astype(np.float32)) <= 0):
            raise ValueError(
                f"a time grid of {times.size - 1} steps of {self.rule!r} is too fine for float32 near t = 1; give fewer steps or a smaller power."
            )
        defaults, given = dict(RULES[self.rule].options), dict(self.options)
        for name, value in given.items():
            if name not in defaults:
                known = f"it has {', '.join(defaults)}" if defaults else "it has none"
                having = [rule for rule, row in RULES.items() if name in dict(row.options)]
                hint = f" {', '.join(having)} has {name!r}." if having else ""
                raise ValueError(f"solver {self.rule!r} has no option {name!r}; {known}.{hint}")
            if not 0 <= float(as_number(f"option {name} of solver {self.rule!r}", value)) < math.inf:
                raise ValueError(f"option {name} of solver {self.rule!r} must be finite, 0 or more; got {value!r}.")
        object.__setattr__(self, "options", tuple((name, float(given.get(name, v))) for name, v in defaults.items()))

    @property
    def evaluations(self) -> int:
        """Network evaluations per draw, without a method's last denoising."""
        return RULES[self.rule].evaluations * (len(self.times) - 1)

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise: then there is no density."""
        return RULES[self.rule].stochastic

    @property
    def gives_density(self) -> bool:
        """Whether log p can be integrated along."""
        return RULES[self.rule].gives_density

    def through(self, times: Sequence[float]) -> "FixedGrid":
        """The same rule on a grid that has these times too. A rule that divides by the length of the step before drops times of its own that are
        nearer to one of them than a quarter of a step. Raises ValueError for times that no grid has."""
        asked = FixedGrid(self.rule, tuple(times)).times
        steps = np.diff(self.times)
        steps = np.minimum(np.append(steps, np.inf), np.insert(steps, 0, np.inf))  # the shorter one beside each time
        near = 0.25 * steps if RULES[self.rule].remembers else np.full_like(steps, 1e-6)
        own = [t for t, least in zip(self.times, near, strict=True) if min(abs(t - other) for other in asked) >= least]
        return dataclasses.replace(self, times=tuple(sorted((*own, *asked))))

    def refined(self) -> "FixedGrid":
        """The same rule with every step halved."""
        middle = [(a + b) / 2 for a, b in zip(self.times, self.times[1:], strict=False)]
        return dataclasses.replace(self, times=tuple(sorted((*self.times, *middle))))

    def schedule(self, method: Method, *, reverse: bool = False) -> Any:
        """All that `solve` needs of time, numpy arrays with a leading axis of steps. Given to a compiled program as an argument it keeps
        XLA from folding it into the steps, one way on one device and another on many."""
        if reverse and not self.gives_density:
            raise ValueError(
                f"solver {self.rule!r} runs from noise to data alone; {', '.join(DENSITY_RULES)} run back too."
            )
        times = self._times(reverse)
        made = RULES[self.rule].prepare(method, times[:-1], times[1:], len(times) - 1, **dict(self.options))
        return _float32(made)

    def volume_schedule(self, method: Method, *, reverse: bool = False) -> Any:
        """All that `solve_with_volume` needs of time: the schedule of the steps, what a velocity at the last time needs ("last"), the weight of the divergence
        at every time, and the logarithm of what the frame's scale grows by."""
        times = self._times(reverse)
        m = known(method.moment, times)
        scale = m.scale.astype(np.float64)
        along = times.astype(np.float64) if method.straight else -m.sigma / scale  # tau - 1, exact near the data
        end = times[-1:]
        made = {
            "last": jax.tree.map(lambda a: a[0], moments("start")(method, end, end, 1)),
            "weights": quadrature.weights(along), "log_scale": np.log(scale[-1] / scale[0]),
        }  # fmt: skip
        return {"steps": self.schedule(method, reverse=reverse), **_float32(made)}

    def _times(self, reverse: bool) -> np.ndarray:
        return np.asarray(self.times[::-1] if reverse else self.times, np.float32)

    def solve(
        self,
        field: Field,
        y: Array,
        context: Any,
        noise: Noise | None = None,
        *,
        schedule: Any = None,
        reverse: bool = False,
        trajectory: bool = False,
        steps: Int32[Array, ""] | None = None,
    ) -> Array:
        """y at the last time from y at the first; `reverse`: the other way.

        `noise`: for stochastic rules. `schedule`: of the field's method and `reverse`; None: made here. `trajectory`: y at every time
        instead, with a new leading axis. `steps`: so many of the rows of a schedule that may be longer, and of any grid, so that one program serves grids
        of every length; it has no gradient.
        """
        rule = RULES[self.rule]
        if rule.stochastic and noise is None:
            raise ValueError(f"solver {self.rule!r} needs noise.")
        schedule = self.schedule(field.method, reverse=reverse) if schedule is None else schedule
        bound = Bound(field, context)

        def step(carry: tuple[Array, Memory], row: tuple[Any, Array]) -> Any:
            y, memory = carry
            p, number = row
            fresh: Any = () if noise is None or not rule.stochastic else (functools.partial(noise, number),)
            y, memory = rule.step(bound, p, y, memory, *fresh)
            return (y, memory), (y if trajectory else None)

        start = (y, (jnp.zeros_like(y), jnp.zeros((), jnp.float32)))
        if steps is not None:
            at = lambda i: jax.tree.map(lambda a: a[i], schedule)  # noqa: E731
            return jax.lax.fori_loop(0, steps, lambda i, carry: step(carry, (at(i), i))[0], start)[0]
        (end, _), path = jax.lax.scan(step, start, (schedule, jnp.arange(len(self.times) - 1)))
        return jnp.concatenate([y[None], path]) if trajectory else end

    def solve_with_volume(
        self,
        field: Field,
        both: WithDivergence,
        y: Array,
        context: Any,
        *,
        schedule: Any = None,
        reverse: bool = False,
    ) -> tuple[Array, Array]:
        """(y at the last time, the integral of div v up to it [slots, draws]: the logarithm of how much a small volume around y grows).

        `both`: the velocity of `field` with its divergence, asked for where a step starts, and at the end; other stages have the velocity alone, a third or a
        quarter of the tangents of rk3 or rk4. The integral (`quadrature`) is of order four; at equal steps less exact than one through all stages.
        `schedule`: `volume_schedule` of the field's method and `reverse`; None: made here. Raises ValueError for a rule that gives no density.
        """
        advance = RULES[self.rule].advance
        if advance is None:
            raise ValueError(f"solver {self.rule!r} gives no log_prob; {', '.join(DENSITY_RULES)} do.")
        schedule = self.volume_schedule(field.method, reverse=reverse) if schedule is None else schedule
        bound, weights, last = Bound(field, context), schedule["weights"], schedule["last"]

        def step(carry: tuple[Array, Array], row: tuple[Any, Array]) -> Any:
            y, grown = carry
            p, weight = row
            y = into_frame(p, y)
            k1, divergence = both(p["start"], y, context)
            return (out_of_frame(p, advance(bound, p, y, k1)), grown + weight * divergence), None

        size = math.prod(y.shape[2:])
        start = (y, jnp.broadcast_to(size * schedule["log_scale"], y.shape[:2]))
        (y, grown), _ = jax.lax.scan(step, start, (schedule["steps"], weights[:-1]))
        _, divergence = both(last["start"], into_frame(last, y), context)
        return y, grown + weights[-1] * divergence

    def to_dict(self) -> dict[str, Any]:
        options = {"options": dict(self.options)} if self.options else {}
        return {"solver": self.rule, "times": list(self.times), **options}
