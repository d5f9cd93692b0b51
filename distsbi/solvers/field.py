"""What a solver asks of a network: velocity, denoised data and score at (t, y), for one observation's context each.

A method is linear in the state y and the prediction f at every time, so all three are two numbers each, held in a `Moment`. Solvers on
fixed grids compute their moments once, before anything is compiled: functions of time inside a compiled loop are fused with what
surrounds them, one way on one device and another on many, and the last bits of draws would depend on the mesh.

The straight frame is the same field in the coordinates

    tau = alpha / (alpha + sigma),    Y = y / (alpha + sigma),    dY/dtau = E[x] - E[z],    Y = tau x + (1 - tau) z

in which every path is that of flow matching, so that a rule written there serves every method.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from distsbi.methods import Method, Moment


def known(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` makes of concrete arrays, as numpy arrays, also while something is being traced. One program: its dozens of
    operations one by one would each be compiled; and one for all equal methods."""
    bound = isinstance(function, types.MethodType)
    program = _program(function.__func__, function.__self__) if bound else jax.jit(function)
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, program(*(np.asarray(a, np.float32) for a in arguments)))


@functools.lru_cache(maxsize=256)
def _program(function: Callable[..., Any], method: Any) -> Any:
    return jax.jit(functools.partial(function, method))


# (moment, y, context) -> the velocity at y and its divergence [slots, draws]
WithDivergence = Callable[[Moment, Array, Any], tuple[Array, Array]]


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
        return f if self.method.predicts_velocity else m.v_y * y + m.v_f * f

    def parts(self, m: Moment, y: Array, context: Any) -> tuple[Array, Array]:
        """(E[x | y], E[z | y])."""
        f = self.f(m, y, context)
        return m.x_y * y + m.x_f * f, m.z_y * y + m.z_f * f
