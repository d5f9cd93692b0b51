"""Fixed grids: a step rule, and one loop over the grid.

A rule is two functions. `prepare(method, t0, t1, steps, **options)` computes all that a step needs of time, for all steps at once, as
numpy arrays with a leading axis of steps (see `field`). `step` uses its row p of it, from t0 to t1 = t0 + h, given what it remembers of
the step before:

    step(field, p, y, memory, noise) -> (y at t1, memory)

`field` is bound to its context; `noise()` gives fresh standard normal numbers for this step. A Runge-Kutta rule is written as what follows from the
velocity k1 at the start, advance(field, p, y, k1) -> y at t1, so that a density asks for a divergence with that one alone. Grids are plain tuples of times,
so that a solver is hashable, JSON-able and one compiled executable.
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
from distsbi.methods import Method, Moment
from distsbi.solvers import quadrature
from distsbi.solvers.field import Field, WithDivergence, known

Memory = tuple[Array, Array]  # what the rule kept of the step before, and that step's length (0 before the first)
Noise = Callable[[Array], Array]  # step number -> standard normal numbers of y's shape


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A field with its context."""

    field: Field
    context: Any

    def v(self, m: Moment, y: Array) -> Array:
        return self.field.velocity(m, y, self.context)

    def parts(self, m: Moment, y: Array) -> tuple[Array, Array]:
        return self.field.parts(m, y, self.context)


PARTS = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of a step


def _moments(*where: str) -> Callable[..., dict[str, Any]]:
    """The preparation of a Runge-Kutta rule: h, and moments at those of `PARTS` that are asked for. A path that is not straight as it is (that of flow
    matching is) is followed in the straight frame."""

    def prepare(method: Method, t0: np.ndarray, t1: np.ndarray, steps: int) -> dict[str, Any]:
        if method.straight:
            times = {"start": t0, "middle": (t0 + t1) / 2, "end": t1}
            return {"h": t1 - t0, **{name: known(method.moment, times[name]) for name in where}}
        p = _straight(method, t0, t1)
        moments = {}
        for name in where:
            t = known(method.time_at, 1.0 - (p["left0"] - PARTS[name] * p["h"]))
            m = known(method.moment, {"start": t0, "end": t1}.get(name, t))
            # the velocity is dY/dtau of Y = y / scale
            moments[name] = dataclasses.replace(
                m, c_in=m.c_in * m.scale, v_y=(m.x_y - m.z_y) * m.scale, v_f=m.x_f - m.z_f
            )
        return {"h": p["h"], "down": 1 / p["scale0"], "up": p["scale1"], **moments}

    return prepare


def _down(p: Any, y: Array) -> Array:
    """The state in the frame that `_moments` prepared a step for."""
    return p["down"] * y if "down" in p else y


def _up(p: Any, y: Array) -> Array:
    """And back, at the step's end."""
    return p["up"] * y if "up" in p else y


Advance = Callable[[_Bound, Any, Array, Array], Array]


def _runge_kutta(advance: Advance, evaluations: int, steps: int, *where: str) -> "Rule":
    """The rule that evaluates at `where`, first at the start."""

    def step(f: _Bound, p: Any, y: Array, memory: Memory) -> tuple[Array, Memory]:
        y = _down(p, y)
        return _up(p, advance(f, p, y, f.v(p["start"], y))), memory

    return Rule(step, _moments(*where), evaluations, steps, advance=advance)


def _euler(f: _Bound, p: Any, y: Array, k1: Array) -> Array:
    """Of E[x] and E[z] at the start, alpha E[x] + sigma E[z] at the end: that of Karras et al. (2206.00364, algorithm 1), and DDIM (2010.02502, eq. 12)."""
    return y + p["h"] * k1


def _midpoint(f: _Bound, p: Any, y: Array, k1: Array) -> Array:
    return y + p["h"] * f.v(p["middle"], y + p["h"] / 2 * k1)


def _heun(f: _Bound, p: Any, y: Array, k1: Array) -> Array:
    return y + p["h"] / 2 * (k1 + f.v(p["end"], y + p["h"] * k1))


def _rk3(f: _Bound, p: Any, y: Array, k1: Array) -> Array:
    """Kutta's third order (1901). It looks at the same times on the way back: what a rough network does between them spoils both ways alike."""
    h = p["h"]
    k2 = f.v(p["middle"], y + h / 2 * k1)
    return y + h / 6 * (k1 + 4 * k2 + f.v(p["end"], y + h * (2 * k2 - k1)))


def _rk4(f: _Bound, p: Any, y: Array, k1: Array) -> Array:
    h = p["h"]
    k2 = f.v(p["middle"], y + h / 2 * k1)
    k3 = f.v(p["middle"], y + h / 2 * k2)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + f.v(p["end"], y + h * k3))


def _straight(method: Method, t0: np.ndarray, t1: np.ndarray) -> dict[str, Any]:
    """Both ends of every step in the straight frame: scales, 1 - tau ("left", exact near the data), and the length in tau."""
    start, end = (known(method.moment, t) for t in (t0, t1))
    left0, left1 = start.sigma / start.scale, end.sigma / end.scale
    return {
        "start": start,
        "scale0": start.scale,
        "scale1": end.scale,
        "left0": left0,
        "left1": left1,
        "h": left0 - left1,
    }


def _prepare_multistep(method: Method, t0: np.ndarray, t1: np.ndarray, steps: int) -> dict[str, Any]:
    p = _straight(method, t0, t1)
    ratio = p["left1"] / p["left0"]
    return {**p, "ratio": ratio, "log_ratio": np.log(np.maximum(ratio, np.finfo(np.float32).tiny))}


def _multistep(f: _Bound, p: Any, y: Array, memory: Memory) -> tuple[Array, Memory]:
    """Second order, one evaluation a step: exact where E[x | y] is linear in tau (DPM-Solver++ 2M, Lu et al. 2211.01095, eq. 12,
    takes it linear in log-SNR).

    In the straight frame, with D = d0 + d1 (tau - tau0), dY/dtau = (D - Y) / (1 - tau) has the solution
    D(tau1) + r (Y - d0) + d1 (1 - tau1) log r, with r = (1 - tau1) / (1 - tau0). The first step is Euler's.
    """
    before, h_before = memory
    end, _ = f.parts(p["start"], y)
    slope = jnp.where(h_before > 0, (end - before) / jnp.where(h_before > 0, h_before, 1.0), 0.0)
    Y = end + slope * p["h"] + p["ratio"] * (y / p["scale0"] - end) + slope * p["left1"] * p["log_ratio"]
    return p["scale1"] * Y, (end, p["h"])


def _kept(method: Method, t1: np.ndarray) -> np.ndarray:
    """0 in a last step onto the data themselves, which is Euler's of the ODE, to E[x]: no denoising would follow the noise, and the pull that
    balances it would leave some behind. Else 1."""
    return np.where(known(method.sigma, t1) > 0, 1.0, 0.0)


def _prepare_euler_maruyama(method: Method, t0: np.ndarray, t1: np.ndarray, steps: int) -> dict[str, Any]:
    h, g2 = t1 - t0, known(method.diffusion2, t0)
    start, kept = known(method.moment, t0), _kept(method, t1)
    return {"start": start, "h": h, "pull": kept * 0.5 * g2 / start.sigma, "spread": kept * np.sqrt(g2 * h)}


def _euler_maruyama(f: _Bound, p: Any, y: Array, memory: Memory, noise: Callable[[], Array]) -> tuple[Array, Memory]:
    """The reverse SDE dy = (v + g^2 score / 2) dt + g dW (Song et al. 2011.13456, eq. 6), g the method's `diffusion2`."""
    m = p["start"]
    prediction = f.field.f(m, y, f.context)
    v, z = m.v_y * y + m.v_f * prediction, m.z_y * y + m.z_f * prediction  # score = -z / sigma
    return y + p["h"] * (v - p["pull"] * z) + p["spread"] * noise(), memory


def _prepare_stochastic_heun(
    method: Method, t0: np.ndarray, t1: np.ndarray, steps: int, *, churn: float, s_min: float, s_max: float, s_noise: float
) -> dict[str, Any]:  # fmt: skip
    p = _straight(method, t0, t1)
    a0, b0 = 1.0 - p["left0"], p["left0"]
    ratio = b0 / np.maximum(a0, 1e-12)
    first = _straight(method, *np.asarray([[0.0], [1.0]], np.float32))
    most = first["left0"] / np.maximum(1.0 - first["left0"], 1e-12)  # the path has no time for more noise
    gamma = np.where((ratio >= s_min) & (ratio <= s_max), min(churn / steps, 2**0.5 - 1), 0.0)
    gamma = np.clip(gamma, 0.0, np.maximum(most / ratio - 1.0, 0.0))
    total = a0 + (1.0 + gamma) * b0
    raised = known(lambda tau: method.moment(method.time_at(tau)), a0 / total)
    # where gamma is 0 the time is t0 itself, without the rounding of its inverse
    raised = jax.tree.map(lambda new, old: np.where(gamma > 0, new, old), raised, p["start"])
    return {
        "raised": raised, "end": known(method.moment, t1), "scale1": p["scale1"],
        "shrink": 1.0 / (p["scale0"] * total), "spread": s_noise * np.sqrt((1.0 + gamma) ** 2 - 1.0) * b0 / total,
        "h": (1.0 + gamma) * b0 / total - p["left1"], "second": np.where(p["left1"] > 0, 1.0, 0.0),
    }  # fmt: skip


def _stochastic_heun(f: _Bound, p: Any, y: Array, memory: Memory, noise: Callable[[], Array]) -> tuple[Array, Memory]:
    """Noise is added, raising sigma / alpha by a factor 1 + gamma, and Heun's step goes from there (Karras et al. 2206.00364,
    algorithm 2), in the straight frame.

    gamma = min(churn / steps, sqrt(2) - 1) where sigma / alpha lies between `s_min` and `s_max`, and no more than takes the state back to t = 0.
    Where no noise is left at the end Euler's step is taken, as in the paper.
    """
    Y = p["shrink"] * y + p["spread"] * noise()
    x, z = f.parts(p["raised"], p["raised"].scale * Y)
    k1 = x - z
    x, z = f.parts(p["end"], p["scale1"] * (Y + p["h"] * k1))
    k2 = p["second"] * (x - z) + (1.0 - p["second"]) * k1
    return p["scale1"] * (Y + p["h"] / 2 * (k1 + k2)), memory


def _prepare_flow_sde(vanishes_at_both_ends: bool) -> Callable[..., dict[str, Any]]:
    def prepare(method: Method, t0: np.ndarray, t1: np.ndarray, steps: int, *, strength: float) -> dict[str, Any]:
        p = _straight(method, t0, t1)
        g2_over_left = strength**2 * ((1.0 - p["left0"]) if vanishes_at_both_ends else np.ones_like(p["h"]))
        kept = _kept(method, t1)
        spread = kept * np.sqrt(g2_over_left * p["left0"] * p["h"])
        return {**p, "pull": kept * 0.5 * g2_over_left, "spread": spread}

    return prepare


def _flow_sde(f: _Bound, p: Any, y: Array, memory: Memory, noise: Callable[[], Array]) -> tuple[Array, Memory]:
    """dY = (v + g^2 score / 2) dtau + g dW in the straight frame, Euler-Maruyama (Singh & Fischer 2410.02217, table 1):
    g^2 = strength^2 tau (1 - tau), which vanishes at both ends, or strength^2 (1 - tau), which is nowhere singular."""
    x, z = f.parts(p["start"], y)
    drift = x - z - p["pull"] * z  # score = -z / (1 - tau)
    return p["scale1"] * (y / p["scale0"] + p["h"] * drift + p["spread"] * noise()), memory


@dataclasses.dataclass(frozen=True)
class Rule:
    """A step and its preparation, evaluations of the network, and options with their defaults. `steps`: on a method's own grid, where none are asked
    for: of a Gaussian 20 times narrower than the prior the sd is then right within 5 % (Euler's: 10 %), with every method. `stochastic`: it asks for noise.
    `remembers`: it divides by the length of the step before. `advance`: of a rule that asks for nothing but the velocity, so that a density can be had."""

    step: Callable[..., tuple[Array, Memory]]
    prepare: Callable[..., dict[str, Any]]
    evaluations: int
    steps: int
    stochastic: bool = False
    options: tuple[tuple[str, float], ...] = ()
    remembers: bool = False
    advance: Advance | None = None

    @property
    def gives_density(self) -> bool:
        return self.advance is not None


RULES: dict[str, Rule] = {
    "euler": _runge_kutta(_euler, 1, 128, "start"),
    "midpoint": _runge_kutta(_midpoint, 2, 16, "start", "middle"),
    "heun": _runge_kutta(_heun, 2, 32, "start", "end"),
    "rk3": _runge_kutta(_rk3, 3, 12, "start", "middle", "end"),
    "rk4": _runge_kutta(_rk4, 4, 12, "start", "middle", "end"),
    "multistep": Rule(_multistep, _prepare_multistep, 1, 32, remembers=True),
    "stochastic_heun": Rule(
        _stochastic_heun, _prepare_stochastic_heun, 2, 128, True,
        (("churn", 10.0), ("s_min", 0.05), ("s_max", 50.0), ("s_noise", 1.0)),
    ),
    "euler_maruyama": Rule(_euler_maruyama, _prepare_euler_maruyama, 1, 128, True),
    "zero_ends": Rule(_flow_sde, _prepare_flow_sde(True), 1, 128, True, (("strength", 1.0),)),
    "non_singular": Rule(_flow_sde, _prepare_flow_sde(False), 1, 128, True, (("strength", 1.0),)),
}  # fmt: skip


DENSITY_RULES = [name for name, rule in RULES.items() if rule.gives_density]


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


def shown(times: Sequence[float]) -> str:
    """Times for a message: of many the first and the last."""
    few = [f"{float(t):.6g}" for t in times]
    return f"({', '.join(few if len(few) <= 8 else [*few[:3], '...', *few[-3:]])})"


@dataclasses.dataclass(frozen=True)
class FixedGrid:
    """A step rule on a grid of increasing times in [0, 1]. `options`: of the rule, as (name, value) pairs; those left out have
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
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
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
            "last": jax.tree.map(lambda a: a[0], _moments("start")(method, end, end, 1)),
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
        bound = _Bound(field, context)

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
        bound, weights, last = _Bound(field, context), schedule["weights"], schedule["last"]

        def step(carry: tuple[Array, Array], row: tuple[Any, Array]) -> Any:
            y, grown = carry
            p, weight = row
            y = _down(p, y)
            k1, divergence = both(p["start"], y, context)
            return (_up(p, advance(bound, p, y, k1)), grown + weight * divergence), None

        size = math.prod(y.shape[2:])
        start = (y, jnp.broadcast_to(size * schedule["log_scale"], y.shape[:2]))
        (y, grown), _ = jax.lax.scan(step, start, (schedule["steps"], weights[:-1]))
        _, divergence = both(last["start"], _down(last, y), context)
        return y, grown + weights[-1] * divergence

    def to_dict(self) -> dict[str, Any]:
        options = {"options": dict(self.options)} if self.options else {}
        return {"solver": self.rule, "times": list(self.times), **options}
