"""A residual MLP with adaptive layer norm.

    h_0     = W_in theta_t
    u_l     = (1 + scale_l(t)) norm(h_l) + shift_l(t)
    h_{l+1} = h_l + W2_l silu(W1_l u_l + C_l(x))
    f       = W_out norm(h_L) + skip(t) theta_t

The observation enters every block as a bias C_l(x), made by `encode`; time enters as scale and shift (adaLN, Peebles & Xie
2212.09748, sec. 3.2), computed once per solver step. So a step costs the same whatever the size of x.
Blocks are stacked along a leading axis and scanned.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from distsbi.networks.base import DTYPES, Network, NetworkParams, broadcast_time, dot


@dataclasses.dataclass(frozen=True)
class MLPParams(NetworkParams):
    """Size of an `MLP`.

    Args:
        dim_theta, ch_theta: parameters and channels of each.
        dim_x, ch_x: data and channels of each.
        width, depth: hidden units and residual blocks.
        embed_depth: residual blocks of the embedding of x.
        time_features: Fourier features of time (even).
        dtype: inputs of the wide matrix products, "float32" or "bfloat16" (accumulated in float32).
        missing: entries of x may be missing; which are there is an input beside them.
        rngs: used to initialise the weights; no part of equality, hash or the stored dictionary.
    """

    dim_theta: int
    dim_x: int
    ch_theta: int = 1
    ch_x: int = 1
    width: int = 96
    depth: int = 4
    embed_depth: int = 2
    time_features: int = 16
    dtype: str = "float32"
    missing: bool = False
    rngs: nnx.Rngs | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("dim_theta", "dim_x", "ch_theta", "ch_x", "width", "depth", "time_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"MLPParams.{name} must be at least 1; got {getattr(self, name)}.")
        if self.embed_depth < 0 or self.time_features % 2:
            raise ValueError("MLPParams needs embed_depth >= 0 and an even time_features.")
        if self.dtype not in DTYPES:
            raise ValueError(f"MLPParams.dtype must be one of {DTYPES}; got {self.dtype!r}.")

    @classmethod
    def default(cls, dim_obs: int, dim_cond: int, ch_obs: int = 1, ch_cond: int = 1) -> "MLPParams":
        """The default network for `dim_obs` parameters and `dim_cond` data."""
        return cls(dim_theta=dim_obs, dim_x=dim_cond, ch_theta=ch_obs, ch_x=ch_cond)


class MLP(Network):
    """The residual MLP. Context: the biases C_l(x), [batch, depth, width]."""

    def __init__(self, params: MLPParams, rngs: nnx.Rngs | None = None):
        rngs = next(r for r in (rngs, params.rngs, nnx.Rngs(0)) if r is not None)
        self.params = p = dataclasses.replace(params, rngs=None)
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = p.dim_theta, p.ch_theta, p.dim_x, p.ch_x
        n_theta, n_x, w = p.dim_theta * p.ch_theta, p.dim_x * (p.ch_x + p.missing), p.width

        def weight(fan_in: int, *shape: int, scale: float = 1.0) -> nnx.Param:
            return nnx.Param(scale * fan_in**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32))

        def zeros(*shape: int) -> nnx.Param:
            return nnx.Param(jnp.zeros(shape, jnp.float32))

        # encode
        self.x_in, self.x_in_bias = weight(n_x, n_x, w), zeros(w)
        if p.embed_depth:  # a run directory holds no arrays of size zero
            self.x_w1, self.x_bias1 = weight(w, p.embed_depth, w, w), zeros(p.embed_depth, w)
            self.x_w2, self.x_bias2 = weight(w, p.embed_depth, w, w, scale=0.1), zeros(p.embed_depth, w)
        self.x_out, self.x_out_bias = weight(w, w, p.depth * w), zeros(p.depth, w)
        # time
        self.t_in, self.t_in_bias = weight(p.time_features, p.time_features, 64), zeros(64)
        self.t_out, self.t_out_bias = weight(64, p.depth, 64, 2 * w, scale=0.1), zeros(p.depth, 2 * w)
        self.t_skip, self.t_skip_bias = zeros(64, n_theta), zeros(n_theta)
        # step
        self.theta_in, self.theta_in_bias = weight(n_theta, n_theta, w), zeros(w)
        self.w1 = weight(w, p.depth, w, w)
        self.w2, self.bias2 = weight(w, p.depth, w, w, scale=0.1), zeros(p.depth, w)
        self.theta_out, self.theta_out_bias = zeros(w, n_theta), zeros(n_theta)

    def encode(
        self, x: Float[Array, "batch dim_x ch_x"], mask: Bool[Array, "batch dim_x"] | None = None
    ) -> Float[Array, "batch depth width"]:
        dtype = self.params.dtype
        if self.params.missing:
            there = jnp.ones(x.shape[:2]) if mask is None else mask.astype(jnp.float32)
            x = jnp.concatenate([x, there[..., None]], -1)
        h = dot(x.reshape(x.shape[0], -1), self.x_in[...], "float32") + self.x_in_bias[...]

        def block(h, p):
            w1, b1, w2, b2 = p
            return h + dot(jax.nn.silu(dot(_norm(h), w1, dtype) + b1), w2, dtype) + b2, None

        if self.params.embed_depth:
            h, _ = jax.lax.scan(block, h, (self.x_w1[...], self.x_bias1[...], self.x_w2[...], self.x_bias2[...]))
        biases = dot(jax.nn.silu(h), self.x_out[...], dtype)
        return biases.reshape(-1, self.params.depth, self.params.width) + self.x_out_bias[...]

    def __call__(
        self,
        t: Float[Array, "..."],
        theta_t: Float[Array, "batch draws dim_theta ch_theta"],
        context: Float[Array, "batch depth width"],
    ) -> Float[Array, "batch draws dim_theta ch_theta"]:
        p = self.params
        batch, draws = theta_t.shape[:2]
        times = broadcast_time(t)
        flat = theta_t.reshape(batch * draws, -1).astype(jnp.float32)

        def rows(a: Array) -> Array:
            """[1 or batch, 1 or draws, k] as [1 or batch * draws, k]: one row per draw only where draws differ."""
            return (
                a[0]
                if a.shape[:2] == (1, 1)
                else jnp.broadcast_to(a, (batch, draws, a.shape[-1])).reshape(batch * draws, -1)
            )

        features = jax.nn.silu(
            dot(rows(_fourier(times, p.time_features)), self.t_in[...], "float32") + self.t_in_bias[...]
        )
        skip = dot(features, self.t_skip[...], "float32") + self.t_skip_bias[...]
        h = dot(flat, self.theta_in[...], "float32") + self.theta_in_bias[...]

        def block(h, layer):
            bias, t_out, t_out_bias, w1, w2, b2 = layer
            scale, shift = jnp.split(dot(features, t_out, p.dtype) + t_out_bias, 2, axis=-1)
            u = (1.0 + scale) * _norm(h) + shift
            return h + dot(jax.nn.silu(dot(u, w1, p.dtype) + rows(bias[:, None])), w2, p.dtype) + b2, None

        context = jnp.moveaxis(context, 1, 0)
        layers = (context, self.t_out[...], self.t_out_bias[...], self.w1[...], self.w2[...], self.bias2[...])
        h, _ = jax.lax.scan(block, h, layers)
        f = dot(_norm(h), self.theta_out[...], "float32") + self.theta_out_bias[...] + skip * flat
        return f.reshape(theta_t.shape)


def _norm(h: Float[Array, "... width"]) -> Float[Array, "... width"]:
    """Layer norm without scale and shift."""
    centred = h - h.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)


def _fourier(t: Float[Array, "..."], features: int) -> Float[Array, "... features"]:
    """cos and sin of pi 2^(k/2) t: slow ones mostly, for a velocity that is smooth in time integrates in few steps."""
    frequencies = jnp.pi * 2.0 ** (jnp.arange(features // 2) / 2)
    angles = t[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
