"""SLCP (sbibm T.3; Papamakarios et al. 1805.07226): simple likelihood, complex posterior.

    theta ~ U(-3, 3)^5,     x = four independent draws of N(m, S), flattened to eight numbers
    m = (theta_0, theta_1),     s_1 = theta_2^2,  s_2 = theta_3^2,  rho = tanh theta_4
    S = [[s_1^2 + eps, rho s_1 s_2], [rho s_1 s_2, s_2^2 + eps]],     eps = 1e-6

The signs of theta_2 and theta_3 do not enter, so the posterior has four equal modes. It has no closed form: `exact` is
None, and sbibm's reference samples serve instead.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key

from distsbi.tasks.base import Task

DRAWS = 4
EPS = 1e-6


def simulate(key: Key[Array, ""], theta: Float[Array, "batch 5"]) -> Float[Array, "batch 8"]:
    s_1, s_2, rho = theta[:, 2] ** 2, theta[:, 3] ** 2, jnp.tanh(theta[:, 4])
    # Cholesky factor of S. The last entry is written as det(S) / S_00 with its terms gathered, all positive: S_11 -
    # l_10^2 cancels in float32.
    l_00 = jnp.sqrt(s_1**2 + EPS)
    l_10 = rho * s_1 * s_2 / l_00
    l_11 = jnp.sqrt((s_1 * s_2) ** 2 * (1 - rho**2) + EPS * (s_1**2 + s_2**2 + EPS)) / l_00
    z = jax.random.normal(key, (theta.shape[0], DRAWS, 2), theta.dtype)
    x_0 = theta[:, 0, None] + l_00[:, None] * z[..., 0]
    x_1 = theta[:, 1, None] + l_10[:, None] * z[..., 0] + l_11[:, None] * z[..., 1]
    return jnp.stack([x_0, x_1], axis=-1).reshape(theta.shape[0], 2 * DRAWS)


def slcp() -> Task:
    prior = dist.Uniform(jnp.full(5, -3.0), jnp.full(5, 3.0)).to_event(1)
    names = tuple(f"theta_{i}" for i in range(5))
    return Task("slcp", prior, simulate, dim_theta=5, dim_x=2 * DRAWS, parameter_names=names)
