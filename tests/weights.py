"""Weights at random that all matter, of NumPy: initialisers, and jax.random, compile a program for every shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def shaken(make: Callable[[], nnx.Module], seed: int = 1, scale: float = 1.0):
    """The network that `make()` makes, all of whose state are parameters, off the zeros and ones that they start from. `scale`: of matrices, less makes
    smoother functions."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = jax.tree_util.keystr(path), rng.normal(size=leaf.shape)
        if "bias" in name:
            noise = 0.1 * noise
        elif "scale" in name:
            noise = 1 + 0.1 * noise
        else:
            noise = scale * noise / leaf.shape[-2] ** 0.5
        return jnp.asarray(noise, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, state))
