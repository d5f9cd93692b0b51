"""An exact network: the velocity of theta | x ~ N(A x, V diag(s^2) V'), in closed form, so that every sampler has a known answer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distsbi.data import Standardizer, Support
from distsbi.methods import FlowMatching
from distsbi.networks import Network
from distsbi.sampling import Posterior


class GaussianNetwork(Network):
    def __init__(self, dim_theta: int = 3, dim_x: int = 2, seed: int = 0):
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = dim_theta, 1, dim_x, 1
        rng = np.random.default_rng(seed)
        rotation, _ = np.linalg.qr(rng.normal(size=(dim_theta, dim_theta)))
        self.rotation = nnx.Param(jnp.asarray(rotation, jnp.float32))
        self.sd = nnx.Param(jnp.asarray(np.geomspace(0.1, 1.5, dim_theta), jnp.float32))
        self.matrix = nnx.Param(jnp.asarray(rng.normal(size=(dim_theta, dim_x)), jnp.float32))

    def encode(self, x):
        return _dot(x[..., 0], self.matrix[...].T)

    def __call__(self, t, theta_t, context):
        t = jnp.asarray(t).reshape(jnp.shape(t) + (1,) * (3 - jnp.ndim(t)))  # [1|batch, 1|draws, 1]
        y = theta_t[..., 0] * jnp.sqrt(t**2 + (1 - t) ** 2)  # undo c_in
        variance = t**2 * self.sd[...] ** 2 + (1 - t) ** 2
        residual = _dot(y - t * context[:, None], self.rotation[...]) / variance
        data = context[:, None] + _dot(t * self.sd[...] ** 2 * residual, self.rotation[...].T)
        noise = _dot((1 - t) * residual, self.rotation[...].T)
        return (data - noise)[..., None]

    def mean(self, x) -> np.ndarray:
        return np.asarray(self.matrix[...]) @ np.asarray(x).ravel()

    def covariance(self) -> np.ndarray:
        rotation, sd = np.asarray(self.rotation[...]), np.asarray(self.sd[...])
        return rotation @ np.diag(sd**2) @ rotation.T


def _dot(a, b):
    """In float32 on GPUs too, as the networks of distsbi."""
    return jnp.matmul(a, b, precision="highest")


TWO = {"data": 2}
FLOW = FlowMatching()


def gaussian_posterior(mesh=TWO, **options) -> Posterior:
    network = GaussianNetwork()
    return Posterior(network, FLOW, Standardizer.identity(3, 2), mesh=mesh, **options)


def random_mlp_posterior(
    mesh=TWO, dim_theta: int = 2, dim_x: int = 3, network=None, method=FLOW, **options
) -> Posterior:
    """An untrained network with a non-trivial output, on the prior (-1, 1)."""
    from distsbi.networks import MLP, MLPParams

    if network is None:
        network = MLP(MLPParams(dim_theta, dim_x, width=16, depth=2), rngs=nnx.Rngs(0))
        network.theta_out[...] = 0.3 * jax.random.normal(jax.random.key(1), network.theta_out.shape)
    rng = np.random.default_rng(0)
    theta, x = rng.uniform(-1, 1, (50, dim_theta, 1)), rng.normal(size=(50, dim_x, 1))
    standardizer = Standardizer.fit(theta.astype("f4"), x.astype("f4"), [Support(-1.0, 1.0)] * dim_theta)
    return Posterior(network, method, standardizer, mesh=mesh, **options)
