"""Two moons (sbibm T.8; Greenberg et al. 1905.07488): a posterior of two thin crescents.

    theta ~ U(-1, 1)^2,     a ~ U(-pi/2, pi/2),     r ~ N(0.1, 0.01^2)
    p = (r cos a + 0.25, r sin a),                  x = p + (-|z_0|, z_1)
    z = ((theta_0 + theta_1) / sqrt 2, (theta_1 - theta_0) / sqrt 2)

The map theta -> z is a rotation, so given x the crescent p runs through the posterior with density one to one:

    |z_0| = p_0 - x_0,     z_1 = x_1 - p_1

Each p with p_0 >= x_0 gives two values of theta, of equal weight, of which those in the prior box are kept. (sbibm's
own sampler also keeps p_0 < x_0, which no theta can produce; for its ten observations this never happens.)
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Key

from distsbi.tasks.base import Task, one_observation

R_LOC, R_SCALE, OFFSET = 0.1, 0.01, 0.25
MIN_PROPOSALS, MIN_ACCEPTANCE = 2**24, 1e-6


def _crescent(key: Key[Array, ""], n: int) -> Float[Array, "n 2"]:
    a_key, r_key = jax.random.split(key)
    a = jax.random.uniform(a_key, (n,), minval=-math.pi / 2, maxval=math.pi / 2)
    r = R_LOC + R_SCALE * jax.random.normal(r_key, (n,))
    return jnp.stack([r * jnp.cos(a) + OFFSET, r * jnp.sin(a)], axis=-1)


def simulate(key: Key[Array, ""], theta: Float[Array, "batch 2"]) -> Float[Array, "batch 2"]:
    z_0 = (theta[:, 0] + theta[:, 1]) / math.sqrt(2)
    z_1 = (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
    return _crescent(key, theta.shape[0]) + jnp.stack([-jnp.abs(z_0), z_1], axis=-1)


@partial(jax.jit, static_argnames="n")
def _propose(key: Key[Array, ""], x_o: Float[Array, "2"], n: int) -> tuple[Float[Array, "n 2"], Bool[Array, " n"]]:
    p_key, sign_key = jax.random.split(key)
    p = _crescent(p_key, n)
    abs_z_0 = p[:, 0] - x_o[0]
    z_0 = jnp.where(jax.random.bernoulli(sign_key, shape=(n,)), abs_z_0, -abs_z_0)
    z_1 = x_o[1] - p[:, 1]
    theta = jnp.stack([z_0 - z_1, z_0 + z_1], axis=-1) / math.sqrt(2)
    return theta, (abs_z_0 >= 0) & (jnp.abs(theta) <= 1).all(axis=-1)


def exact(key: Key[Array, ""], x_o: object, n: int) -> Float[np.ndarray, "n 2"]:
    """n draws of p(theta | x_o), by rejection; float32.

    Raises ValueError if x_o is not one finite observation, or if no theta in the prior box is found that produces it.
    """
    row = one_observation(x_o, 2)
    size = max(2**14, 1 << (2 * n - 1).bit_length())  # powers of two: few shapes to compile
    kept: list[np.ndarray] = []
    found = proposed = 0
    while found < n:
        if proposed >= MIN_PROPOSALS and found < MIN_ACCEPTANCE * proposed:
            raise ValueError(
                f"x_o = {row.tolist()} is hardly possible under two_moons: {found} of {proposed} proposals lie in the "
                "prior box [-1, 1]^2. Give an observation that the simulator can produce."
            )
        theta, inside = jax.device_get(_propose(jax.random.fold_in(key, len(kept)), jnp.asarray(row), size))
        kept.append(theta[inside])
        found += len(kept[-1])
        proposed += size
        size = max(size, 2**20)
    return np.concatenate(kept)[:n]


def two_moons() -> Task:
    prior = dist.Uniform(-jnp.ones(2), jnp.ones(2)).to_event(1)
    return Task("two_moons", prior, simulate, dim_theta=2, dim_x=2, parameter_names=("theta_0", "theta_1"), exact=exact)
