"""What a solver asks of a network: velocity, denoised data and score at (t, y), for one observation's context each.

A method is linear in the state y and the prediction f at every time, so all three are two numbers each, held in a `Moment`. Solvers on
fixed grids compute their moments once, before anything is compiled: functions of time inside a compiled loop are fused with what
surrounds them, one way on one device and another on many, and the last bits of draws would depend on the mesh.

The straight frame is the same field in the coordinates

    tau = alpha / (alpha + sigma),    Y = y / (alpha + sigma),    dY/dtau = E[x] - E[z],    Y = tau x + (1 - tau) z

in which every path is that of flow matching, so that a rule written there serves every method.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from distsbi.methods import FlowMatching, Method


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
    """A time t, and what a method makes of it: v = v_y y + v_f f, E[x] = x_y y + x_f f, E[z] = z_y y + z_f f."""

    t: Array
    c_time: Array
    c_in: Array
    alpha: Array
    sigma: Array
    x_y: Array
    x_f: Array
    z_y: Array
    z_f: Array
    v_y: Array
    v_f: Array

    @classmethod
    def at(cls, method: Method, t: Array) -> Self:
        """At any times, traced or not."""
        a, b = method.target(t)
        alpha, sigma, d_alpha, d_sigma = method.alpha(t), method.sigma(t), method.d_alpha(t), method.d_sigma(t)
        determinant = alpha * b - sigma * a
        x_y, x_f, z_y, z_f = b / determinant, -sigma / determinant, -a / determinant, alpha / determinant
        v_y, v_f = d_alpha * x_y + d_sigma * z_y, d_alpha * x_f + d_sigma * z_f
        if isinstance(method, FlowMatching):  # without rounding: the prediction is the velocity
            v_y, v_f = jnp.zeros_like(t), jnp.ones_like(t)
        return cls(t, method.c_time(t), method.c_in(t), alpha, sigma, x_y, x_f, z_y, z_f, v_y, v_f)

    @property
    def scale(self) -> Array:
        """alpha + sigma: y = scale Y."""
        return self.alpha + self.sigma


def known(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` makes of concrete arrays, as numpy arrays, also while something is being traced. One program: its dozens of
    operations one by one would each be compiled."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, jax.jit(function)(*(np.asarray(a, np.float32) for a in arguments)))


@dataclasses.dataclass(frozen=True)
class Field:
    """`predict(c_time, c_in y, context)` is the network's answer f, [slots, draws, ...], for scalar times."""

    predict: Callable[[Array, Array, Any], Array]
    method: Method

    def f(self, m: Moment, y: Any, context: Any) -> Any:
        return self.predict(m.c_time, m.c_in * y, context)

    def velocity(self, m: Moment, y: Any, context: Any) -> Any:
        """dy/dt of the probability-flow ODE."""
        f = self.f(m, y, context)
        return f if isinstance(self.method, FlowMatching) else m.v_y * y + m.v_f * f

    def parts(self, m: Moment, y: Array, context: Any) -> tuple[Array, Array]:
        """(E[x | y], E[z | y])."""
        f = self.f(m, y, context)
        return m.x_y * y + m.x_f * f, m.z_y * y + m.z_f * f

    def moment(self, t: Array) -> Moment:
        return Moment.at(self.method, t)


@dataclasses.dataclass(frozen=True)
class VelocityField(Field):
    """A field of which only the velocity is known: `predict(t, y, context)` is it, for any y. `method` gives the times their meaning."""

    method: Method = FlowMatching()  # noqa: RUF009  (frozen)

    def velocity(self, m: Moment, y: Any, context: Any) -> Any:
        return self.predict(m.t, y, context)

    def parts(self, m: Moment, y: Array, context: Any) -> tuple[Array, Array]:
        v = self.predict(m.t, y, context)
        return m.x_y * y + m.x_f * v, m.z_y * y + m.z_f * v
