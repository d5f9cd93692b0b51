"""Gaussian linear (sbibm T.1): the mean of a Gaussian under a Gaussian prior, in ten dimensions.

    theta ~ N(0, 0.1 I),     x | theta ~ N(theta, 0.1 I)     (variances)

The posterior is Gaussian: covariance (1/0.1 + 1/0.1)^-1 I = 0.05 I, mean 0.05 x / 0.1 = x / 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key

from distsbi.tasks.base import Task, one_observation

DIM = 10
PRIOR_VARIANCE = 0.1
NOISE_VARIANCE = 0.1


def simulate(key: Key[Array, ""], theta: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    return theta + NOISE_VARIANCE**0.5 * jax.random.normal(key, theta.shape, theta.dtype)


def posterior_moments(x_o: object) -> tuple[Float[np.ndarray, " dim"], Float[np.ndarray, "dim dim"]]:
    """Mean and covariance of p(theta | x_o)."""
    row = one_observation(x_o, DIM).astype(np.float64)
    variance = 1 / (1 / PRIOR_VARIANCE + 1 / NOISE_VARIANCE)
    return variance / NOISE_VARIANCE * row, variance * np.eye(DIM)


def exact(key: Key[Array, ""], x_o: object, n: int) -> Float[np.ndarray, "n dim"]:
    """n draws of p(theta | x_o), float32. Raises ValueError if x_o is not one finite observation."""
    mean, covariance = posterior_moments(x_o)
    z = np.asarray(jax.random.normal(key, (n, DIM), jnp.float32))
    return (mean + z * np.sqrt(covariance[0, 0])).astype(np.float32)


def gaussian_linear() -> Task:
    prior = dist.Normal(0.0, PRIOR_VARIANCE**0.5).expand((DIM,)).to_event(1)
    names = tuple(f"theta_{i}" for i in range(DIM))
    return Task("gaussian_linear", prior, simulate, dim_theta=DIM, dim_x=DIM, parameter_names=names, exact=exact)
