"""A task: a prior p(theta), a simulator p(x | theta) and, where it is known, the exact posterior p(theta | x).

A task is a value. Its simulator is a pure, jittable function of a key and a batch of parameters, so that pairs can be
made on the devices, inside a training step, or ahead of time into a Parquet folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Simulator = Callable[[Key[Array, ""], Float[Array, "batch dim_theta"]], Float[Array, "batch dim_x"]]
ExactSampler = Callable[[Key[Array, ""], Any, int], Float[np.ndarray, "n dim_theta"]]


@dataclass(frozen=True, eq=False)
class Task:
    """One simulator with its prior.

    name: what the command line and the run directory call it.
    prior: a numpyro distribution of event shape `(dim_theta,)`, or anything with `sample(key, shape)`, `log_prob` and
    `support`.
    simulate: `simulate(key, theta [batch, dim_theta]) -> x [batch, dim_x]`, jittable.
    exact: `exact(key, x_o [dim_x], n) -> theta [n, dim_theta]`, draws of the exact posterior; None where no such
    sampler is known.
    """

    name: str
    prior: Any
    simulate: Simulator
    dim_theta: int
    dim_x: int
    parameter_names: tuple[str, ...]
    exact: ExactSampler | None = None

    def __post_init__(self) -> None:
        if len(self.parameter_names) != self.dim_theta:
            raise ValueError(
                f"task {self.name!r} has dim_theta={self.dim_theta} but {len(self.parameter_names)} parameter names "
                f"({', '.join(self.parameter_names)}); give one name per parameter."
            )

    def pairs(self, key: Key[Array, ""], n: int) -> tuple[Float[Array, "n dim_theta 1"], Float[Array, "n dim_x 1"]]:
        """n joint draws (theta, x), float32, with a channel axis. Jittable for a static n."""
        theta_key, x_key = jax.random.split(key)
        theta = self.prior.sample(theta_key, (n,))
        x = self.simulate(x_key, theta)
        return theta[..., None].astype(jnp.float32), x[..., None].astype(jnp.float32)


def one_observation(x_o: object, dim_x: int) -> Float[np.ndarray, " dim_x"]:
    """One observation as a flat float32 row; `[dim_x]`, `[1, dim_x]`, `[dim_x, 1]` and `[1, dim_x, 1]` are all
    accepted.

    Raises ValueError if it has another size, or holds NaN or inf.
    """
    row = np.asarray(x_o, np.float32)
    if row.size != dim_x:
        raise ValueError(f"x_o must be one observation of {dim_x} numbers; got shape {row.shape}.")
    if not np.isfinite(row).all():
        raise ValueError(f"x_o must be finite; got {row.ravel().tolist()}.")
    return row.reshape(dim_x)
