"""The rules of a step on a fixed grid, as rows of one table.

A rule is two functions. `prepare(method, t0, t1, steps, **options)` computes all that a step needs of time, for all steps at once, as
numpy arrays with a leading axis of steps (see `field`). `step` uses its row p of it, from t0 to t1 = t0 + h, given what it remembers of
the step before:

    step(field, p, y, memory, noise) -> (y at t1, memory)

`field` is bound to its context; `noise()` gives fresh standard normal numbers for this step. A Runge-Kutta rule is written as what follows from the
velocity k1 at the start, advance(field, p, y, k1) -> y at t1, so that a density asks for a divergence with that one alone. A new rule is one line of `RULES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from distsbi.methods import Method, Moment
from distsbi.solvers.field import Field, known

Memory = tuple[Array, Array]  # what the rule kept of the step before, and that step's length (0 before the first)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A field with its context."""

    field: Field
    context: Any

    def v(self, m: Moment, y: Array) -> Array:
        return self.field.velocity(m, y, self.context)

    def parts(self, m: Moment, y: Array) -> tuple[Array, Array]:
        return self.field.parts(m, y, self.context)


PARTS = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of a step


def moments(*where: str) -> Callable[..., dict[str, Any]]:
    """The preparation of a Runge-Kutta rule: h, and moments at those of `PARTS` that are asked for. A path that is not straight as it is (that of flow
    matching is) is followed in the straight frame."""

    def prepare(method: Method, t0: np.ndarray, t1: np.ndarray, steps: int) -> dict[str, Any]:
        if method.straight:
            times = {"start": t0, "middle": (t0 + t1) / 2, "end": t1}
            return {"h": t1 - t0, **{name: known(method.moment, times[name]) for name in where}}
        p = _straight(method, t0, t1)
        made = {}
        for name in where:
            t = known(method.time_at, 1.0 - (p["left0"] - PARTS[name] * p["h"]))
            m = known(method.moment, {"start": t0, "end": t1}.get(name, t))
            # the velocity is dY/dtau of Y = y / scale
            made[name] = dataclasses.replace(m, c_in=m.c_in * m.scale, v_y=(m.x_y - m.z_y) * m.scale, v_f=m.x_f - m.z_f)
        return {"h": p["h"], "down": 1 / p["scale0"], "up": p["scale1"], **made}

    return prepare


def into_frame(p: Any, y: Array) -> Array:
    """The state in the frame that `moments` prepared a step for."""
    return p["down"] * y if "down" in p else y


def out_of_frame(p: Any, y: Array) -> Array:
    """And back, at the step's end."""
    return p["up"] * y if "up" in p else y


Advance = Callable[[Bound, Any, Array, Array], Array]


def _runge_kutta(advance: Advance, evaluations: int, steps: int, *where: str) -> "Rule":
    """The rule that evaluates at `where`, first at the start."""

    def step(f: Bound, p: Any, y: Array, memory: Memory) -> tuple[Array, Memory]:
        y = into_frame(p, y)
        return out_of_frame(p, advance(f, p, y, f.v(p["start"], y))), memory

    return Rule(step, moments(*where), evaluations, steps, advance=advance)


def _euler(f: Bound, p: Any, y: Array, k1: Array) -> Array:
    """Of E[x] and E[z] at the start, alpha E[x] + sigma E[z] at the end: that of Karras et al. (2206.00364, algorithm 1), and DDIM (2010.02502, eq. 12)."""
    return y + p["h"] * k1


def _midpoint(f: Bound, p: Any, y: Array, k1: Array) -> Array:
    return y + p["h"] * f.v(p["middle"], y + p["h"] / 2 * k1)


def _heun(f: Bound, p: Any, y: Array, k1: Array) -> Array:
    return y + p["h"] / 2 * (k1 + f.v(p["end"], y + p["h"] * k1))


def _rk3(f: Bound, p: Any, y: Array, k1: Array) -> Array:
    """Kutta's third order (1901). It looks at the same times on the way back: what a rough network does between them spoils both ways alike."""
    h = p["h"]
    k2 = f.v(p["middle"], y + h / 2 * k1)
    return y + h / 6 * (k1 + 4 * k2 + f.v(p["end"], y + h * (2 * k2 - k1)))


def _rk4(f: Bound, p: Any, y: Array, k1: Array) -> Array:
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


def _multistep(f: Bound, p: Any, y: Array, memory: Memory) -> tuple[Array, Memory]:
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


def _euler_maruyama(f: Bound, p: Any, y: Array, memory: Memory, noise: Callable[[], Array]) -> tuple[Array, Memory]:
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


def _stochastic_heun(f: Bound, p: Any, y: Array, memory: Memory, noise: Callable[[], Array]) -> tuple[Array, Memory]:
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


def _flow_sde(f: Bound, p: Any, y: Array, memory: Memory, noise: Callable[[], Array]) -> tuple[Array, Memory]:
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
