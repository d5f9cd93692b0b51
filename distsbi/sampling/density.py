"""log p(theta | x) by the instantaneous change of variables.

    d log p / dt = -div v(t, y),    log p(y_1) = log N(y_0; 0, I) - int_0^1 div v dt

(Chen et al. 1806.07366, eq. 8), integrated from the data end to the noise end, with the exact divergence: one Jacobian-vector
product per parameter of the same linearised velocity, so the observation is encoded once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array

from distsbi import mesh as meshes
from distsbi.methods import Method
from distsbi.sampling.tiles import Weights, velocity
from distsbi.solvers import FixedGrid


@functools.lru_cache(maxsize=16)
def density_program(graphdef: nnx.GraphDef, method: Method, grid: FixedGrid, mesh: Mesh) -> Callable[..., Array]:
    """(weights, theta [n, dim_theta, ch_theta], x [1, dim_x, ch_x]) -> log p [n], n a multiple of the device count."""

    def program(weights: Weights, theta: Array, x: Array) -> Array:
        network = nnx.merge(graphdef, weights.params)
        standardizer = weights.standardizer
        context = network.encode(standardizer.forward_x(x))
        field = velocity(network, method)
        centre = standardizer.centre(x)
        y = standardizer.forward(theta, centre)
        shape = y.shape[1:]

        def flow(t: Array, state: tuple[Array, Array], context: object) -> tuple[Array, Array]:
            points, _ = state
            v, push = jax.linearize(lambda p: field(t, p[None], context)[0], points)
            basis = jnp.eye(v[0].size, dtype=v.dtype).reshape(-1, *shape)
            along = jax.lax.map(lambda e: jnp.sum(push(jnp.broadcast_to(e, points.shape)) * e, axis=(1, 2)), basis)
            return v, along.sum(0)

        times = jnp.asarray(grid.times[::-1], jnp.float32)

        def step(state: tuple[Array, Array], interval: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            t0, t1 = interval
            h = t1 - t0
            move = lambda k, s: jax.tree.map(lambda a, b: a + s * b, state, k)  # noqa: E731
            k1 = flow(t0, state, context)
            k2 = flow(t0 + h / 2, move(k1, h / 2), context)
            k3 = flow(t0 + h / 2, move(k2, h / 2), context)
            k4 = flow(t1, move(k3, h), context)
            return jax.tree.map(lambda y, a, b, c, d: y + h / 6 * (a + 2 * b + 2 * c + d), state, k1, k2, k3, k4), None

        (z, change), _ = jax.lax.scan(step, (y, jnp.zeros(len(y), jnp.float32)), (times[:-1], times[1:]))
        sigma = method.sigma(jnp.zeros((), jnp.float32))
        z = z / sigma
        base = jnp.sum(-0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi) - jnp.log(sigma), axis=(1, 2))
        inside = standardizer.contains(theta)
        return jnp.where(inside, base + change + standardizer.log_det(y, centre), -jnp.inf)

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(P(), P(meshes.DATA), P()), out_specs=P(meshes.DATA), check_vma=False
    )
    return jax.jit(mapped)
