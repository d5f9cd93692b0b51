"""The flow between noise and theta: draws and their densities, pure functions of one tile.

    d log p / dt = -div v(t, y),    log p(y_1) = log p(y_0) - int_0^1 div v dt

(Chen et al. 1806.07366, eq. 8). Velocity and divergence come from one pass: the velocity is linearised once at (t, y), and the
tangents are pushed through that. The observation is encoded outside, so no tangent enters its stream.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distsbi.data.standardise import Standardizer
from distsbi.methods import Method, Moment
from distsbi.networks.base import Context
from distsbi.solvers import Field, Solver
from distsbi.solvers.field import WithDivergence, known
from distsbi.solvers.fixed import Noise

Encoded = tuple[Context, Float[Array, "batch dim_theta ch_theta"]]  # the network's context, the standardizer's centre
Tiled = Float[Array, "slots draws dim_theta ch_theta"]

BASIS_AT_ONCE = 8  # tangents pushed through the linearised velocity together


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How div v is computed: exactly, with a tangent for each parameter; or (`probes` > 0) as the mean of e' J e over so many
    random signs e, which is unbiased and the same throughout a solve (Hutchinson; Grathwohl et al. 1810.01367, eq. 7)."""

    probes: int = 0

    def __post_init__(self) -> None:
        if self.probes < 0:
            raise ValueError(f"the number of probes must be 0 (exact) or more; got {self.probes}.")


EXACT = Divergence()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """All that a tile needs of time: the solver's own schedule, and the moment t = 1."""

    steps: Any
    last: Moment


@functools.lru_cache(maxsize=64)
def make_schedule(solver: Solver, method: Method, *, reverse: bool = False, density: bool = False) -> Schedule:
    """The schedule of a solver and a method, numpy arrays; `density`: of a solve that has a density too."""
    steps = solver.volume_schedule if density else solver.schedule
    return Schedule(steps(method, reverse=reverse), known(method.moment, 1.0))


def denoise(field: Field, y: Tiled, context: Context, last: Moment | None = None) -> Tiled:
    """E[x | x_1], what is left to do at t = 1 by a method that `denoises`."""
    return field.parts(known(field.method.moment, 1.0) if last is None else last, y, context)[0]


def draw_tile(
    network: Any,
    method: Method,
    solver: Solver,
    standardizer: Standardizer,
    encoded: Encoded,
    z: Tiled,
    noise: Noise | None = None,
    schedule: Schedule | None = None,
    *,
    trajectory: bool = False,
) -> Array:
    """theta from noise: the function under every way to sample.

    `noise`: for stochastic solvers. `schedule`: of this solver and method; None: made here. `trajectory`: theta at every time of the grid, with a leading axis.
    """
    context, centre = encoded
    field = Field(network, method)
    steps, at_last = (None, None) if schedule is None else (schedule.steps, schedule.last)
    y = solver.solve(field, method.initial(z), context, noise, schedule=steps, trajectory=trajectory)
    if method.denoises:
        last = denoise(field, y[-1] if trajectory else y, context, at_last)
        y = jnp.concatenate([y[:-1], last[None]]) if trajectory else last
    return standardizer.inverse(y, centre[:, None])


def log_density(
    network: Any,
    method: Method,
    solver: Solver,
    standardizer: Standardizer,
    encoded: Encoded,
    theta: Tiled,
    divergence: Divergence = EXACT,
    noise: Noise | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "slots draws"]:
    """log p(theta | x), -inf outside the prior's support. Of a method that leaves noise at t = 1: of theta with that noise."""
    context, centre = encoded
    y = standardizer.forward(theta, centre[:, None])
    field = Field(network, method)
    both = _with_divergence(field, y.shape[2:], divergence, noise)
    steps = None if schedule is None else schedule.steps
    z, change = solver.solve_with_volume(field, both, y, context, schedule=steps, reverse=True)
    density = _base(method, z) + change + standardizer.log_det(y, centre[:, None])
    return jnp.where(standardizer.bijection.contains(theta), density, -jnp.inf)


def draws_and_density(
    network: Any,
    method: Method,
    solver: Solver,
    standardizer: Standardizer,
    encoded: Encoded,
    z: Tiled,
    divergence: Divergence = EXACT,
    noise: Noise | None = None,
    schedule: Schedule | None = None,
) -> tuple[Tiled, Float[Array, "slots draws"]]:
    """theta from noise and log p(theta | x), in one solve. Noise that a method leaves at t = 1 is kept."""
    context, centre = encoded
    field = Field(network, method)
    both = _with_divergence(field, z.shape[2:], divergence, noise)
    start = method.initial(z)
    steps = None if schedule is None else schedule.steps
    y, change = solver.solve_with_volume(field, both, start, context, schedule=steps)
    theta = standardizer.inverse(y, centre[:, None])
    return theta, _base(method, start) - change + standardizer.log_det(y, centre[:, None])


def _with_divergence(
    field: Field, shape: tuple[int, ...], divergence: Divergence, noise: Noise | None
) -> WithDivergence:
    """The field's velocity at y [slots, draws, *shape], and div v [slots, draws], in one pass."""
    size = math.prod(shape)

    def signs(like: Array, probe: Array) -> Array:
        assert noise is not None
        fresh = noise(jnp.uint32(2**31) + probe.astype(jnp.uint32))
        return jnp.where(fresh < 0, -1.0, 1.0).astype(like.dtype).reshape(like.shape)

    if divergence.probes:
        probes = jnp.arange(divergence.probes)

    def both(m: Moment, y: Array, context: Context) -> tuple[Array, Array]:
        def there(y: Array) -> Array:
            return field.velocity(m, y, context)

        def along(e: Array) -> Array:
            return jnp.sum(push(jnp.broadcast_to(e, y.shape)) * e, axis=(-2, -1))

        basis = jnp.eye(size, dtype=y.dtype).reshape(size, *shape)
        if divergence.probes:
            v, push = jax.linearize(there, y)
            trace = jax.lax.map(lambda probe: along(signs(y, probe)), probes).mean(0)
        elif size <= BASIS_AT_ONCE:  # layer by layer beside the state: nothing is kept for later
            v, trace = jax.vmap(lambda e: _with_tangent(there, y, e), out_axes=(None, 0))(basis)
            trace = trace.sum(0)
        else:
            v, push = jax.linearize(there, y)
            trace = jax.lax.map(along, basis, batch_size=BASIS_AT_ONCE).sum(0)
        return v, trace

    return both


def _with_tangent(there: Callable[[Array], Array], y: Array, e: Array) -> tuple[Array, Array]:
    """The velocity at y, and e' J e."""
    v, tangent = jax.jvp(there, (y,), (jnp.broadcast_to(e, y.shape),))
    return v, jnp.sum(tangent * e, axis=(-2, -1))


def _base(method: Method, y: Tiled) -> Float[Array, "slots draws"]:
    """log N(y; 0, sigma(0)^2)."""
    sigma = known(method.sigma, 0.0)
    return jnp.sum(-0.5 * (y / sigma) ** 2 - 0.5 * math.log(2 * math.pi) - np.log(sigma), axis=(-2, -1))
