"""Flux1: a multimodal diffusion transformer whose tokens are the parameters and the data.

    token_i = sqrt(hidden) (W theta_i + b) + id_i        ("sum"; "concat": [W theta_i + b, id_i]; RoPE: W theta_i + b)
    double blocks (own weights per stream, common attention), single blocks (common weights), f = W_out modulate(h_theta)
    vec(t) = MLP(cos, sin of 1000 t at 128 frequencies) gives shift, scale and gate of every block

Esser et al. 2403.03206 and Black Forest Labs' FLUX.1; the variant for simulation-based inference is GenSBI's, whose parameter
tree (but for `pooled_in`) and, with `conditioning="joint"`, whose function this is (see `networks.gensbi`).

Two ways for the data to enter:
- "joint": both streams attend to both, at every step and for every draw. Context: the data's tokens.
- "one_way": data tokens attend only to data tokens and are modulated by vec(1), at every step (a constant: the time of clean data, but for
  EDM, which tells the network ln(sigma) / 4). The whole data stream is then a function of x alone: `encode` runs it once and keeps each
  block's keys and values, shared by all draws, and, if `pooled`, an embedding of the mean of its last tokens, which is added to
  vec(t) (as of a prompt in 2403.03206, sec. 4): shift, scale and gate of every block then know the data. They are computed once for an
  observation and step, not for each draw.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from distsbi.networks.base import Context, Network, broadcast_time
from distsbi.networks.flux1_blocks import (
    Rotation,
    Tokens,
    Weights,
    attention,
    double_half,
    double_qkv,
    embed_vector,
    layer_norm,
    linear,
    modulate,
    modulation,
    rotation,
    single_block,
    stream,
)
from distsbi.networks.flux1_params import Flux1Params
from distsbi.networks.weights import TIME_FEATURES, Maker, long_axis_last, timestep_features, weights_of

NO_TABLE = ("rope", "none")  # strategies that add nothing to a token


class Flux1(Network):
    """The transformer. Identical blocks are stacked along a leading axis and scanned.

    Context: "joint", the data's tokens [batch, dim_x, hidden]; "one_way", {"double": (k, v), "single": (k, v)}, normed and
    rotated, each [batch, blocks, dim_x, heads, head_dim], and, if pooled, "pooled" [batch, hidden].

    At initialisation all gates, the last layer and the pooled vector are zero (adaLN-zero): the prediction is 0 and every block the identity.
    Token values and ids start with equal size, so that the norms do not remove a scalar's magnitude.

    Args:
        params: sizes.
        rngs: for the weights; otherwise `params.rngs`, otherwise seed 0.
    """

    # The gradient of attention among a few tokens is hundreds of small sums. XLA hands each to a library call of about 0.5 ms:
    # 89 ms for a gradient of 256 pairs with two times each, against 60 ms with its own loops (2 cores with AMX, jax 0.10.2).
    cpu_compiler_options = {"xla_cpu_experimental_ynn_fusion_type": ""}  # noqa: RUF012

    def __init__(self, params: Flux1Params, rngs: nnx.Rngs | None = None):
        rngs = next(r for r in (rngs, params.rngs, nnx.Rngs(0)) if r is not None)
        self.params = p = dataclasses.replace(params, rngs=None)
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = p.dim_obs, p.in_channels, p.dim_cond, p.context_in_dim
        dtype, hidden, width = jnp.dtype(p.param_dtype), p.hidden_size, p.mlp_width

        make = Maker(rngs, dtype)
        normal, dense = make.normal, make.dense

        def token_in(channels: int, strategy: str) -> nnx.Dict:
            size = hidden**-0.5 if p.id_merge_mode == "sum" and not strategy.startswith(NO_TABLE) else 1.0
            return make.token_in(channels, p.value_width, size)

        self.obs_in = token_in(p.in_channels, p.id_embedding_strategy[0])
        self.cond_in = token_in(p.context_in_dim, p.id_embedding_strategy[1])
        if p.id_embedding_strategy[0] == "absolute":
            self.obs_ids_embedder = nnx.Dict(embedding=normal(1.0, p.dim_obs, p.id_width))
        if p.id_embedding_strategy[1] == "absolute":
            self.cond_ids_embedder = nnx.Dict(embedding=normal(1.0, p.dim_cond, p.id_width))
        self.time_in = nnx.Dict(in_layer=dense(TIME_FEATURES, hidden), out_layer=dense(hidden, hidden))

        n = p.depth
        double = {}
        for name in ("obs", "cond"):
            double[f"{name}_mod"] = nnx.Dict(lin=dense(hidden, 6 * hidden, n, scale=0.0))
            double[f"{name}_attn"] = nnx.Dict(
                qkv=dense(hidden, 3 * hidden, n, bias=p.qkv_bias),
                norm=make.qk_norm(p.head_dim, n),
                proj=dense(hidden, hidden, n),
            )
            double[f"{name}_mlp"] = nnx.Dict(in_layer=dense(hidden, width, n), out_layer=dense(width, hidden, n))
        self.double_blocks = nnx.Dict(double)
        n = p.depth_single_blocks
        self.single_blocks = nnx.Dict(
            linear1=dense(hidden, 3 * hidden + width, n),
            linear2=dense(hidden + width, hidden, n),
            norm=make.qk_norm(p.head_dim, n),
            modulation=nnx.Dict(lin=dense(hidden, 3 * hidden, n, scale=0.0)),
        )
        self.final_layer = nnx.Dict(
            linear=dense(hidden, p.in_channels, scale=0.0), adaLN_modulation=dense(hidden, 2 * hidden, scale=0.0)
        )
        if p.pooled:
            self.pooled_in = nnx.Dict(in_layer=dense(hidden, hidden), out_layer=dense(hidden, hidden, scale=0.0))

    @property
    def exchangeable(self) -> bool:  # type: ignore[override]
        """Whether the data are a set."""
        return self.params.id_embedding_strategy[1] == "none"

    def encode(self, x: Float[Array, "batch dim_x ch_x"], mask: Bool[Array, "batch dim_x"] | None = None) -> Context:
        """The data's tokens ("joint"), or their keys and values in every block ("one_way"); with `missing` and the mask.

        Raises ValueError if `x` does not have shape [batch, dim_x, ch_x].
        """
        p = self.params
        if x.ndim != 3 or x.shape[1:] != (p.dim_cond, p.context_in_dim):
            raise ValueError(f"x must have shape (batch, {p.dim_cond}, {p.context_in_dim}); got {x.shape}.")
        h = self._tokens("cond", jnp.transpose(x, (2, 1, 0))[:, :, None])
        there = jnp.ones(x.shape[:2], bool) if mask is None or not p.missing else mask
        if p.conditioning == "joint":
            tokens = jnp.transpose(h[:, :, 0], (2, 1, 0))
            return {"tokens": tokens, "mask": there} if p.missing else tokens

        keys = jnp.transpose(there)[:, None, :] if p.missing else None  # [tokens, 1, batch]: one draw
        turn = self._rotation("cond", p.dim_cond)
        vec = self._time(jnp.ones((1, 1)))
        double, single = weights_of(self.double_blocks), weights_of(self.single_blocks)

        def double_step(h: Tokens, layer: Any) -> Any:
            block, parts = layer
            weights = stream(block, "cond")
            q, k, v = double_qkv(weights, h, parts, p.num_heads, turn, p.dtype)
            return double_half(weights, h, attention(q, [(k, v, keys)], p.dtype), parts, p.dtype), (k, v)

        def single_step(h: Tokens, layer: Any) -> Any:
            return single_block(*_swap(layer, h), p.num_heads, turn, p.dtype, (), keys)

        h, of_double = jax.lax.scan(_again(double_step), h, (double, modulation(double["cond_mod"], vec, 6)))
        h, of_single = jax.lax.scan(_again(single_step), h, (single, modulation(single["modulation"], vec, 3)))
        # [blocks, heads, head_dim, tokens, 1, batch] -> [batch, blocks, tokens, heads, head_dim]
        kept = jax.tree.map(
            lambda a: jnp.transpose(a[..., 0, :], (4, 0, 3, 1, 2)), {"double": of_double, "single": of_single}
        )
        if p.pooled:
            some = jnp.transpose(there)[:, None, :]  # [tokens, 1, batch]
            count = jnp.maximum(some.astype(jnp.float32).sum(0), 1.0)
            mean = jnp.where(some, layer_norm(h), 0.0).sum(1) / count
            kept["pooled"] = jnp.transpose(embed_vector(weights_of(self.pooled_in), mean)[:, 0])
        return {**kept, "mask": there} if p.missing else kept

    def __call__(
        self, t: Float[Array, "..."], theta_t: Float[Array, "batch draws dim_theta ch_theta"], context: Context
    ) -> Float[Array, "batch draws dim_theta ch_theta"]:
        p = self.params
        if theta_t.ndim != 4 or theta_t.shape[2:] != (p.dim_obs, p.in_channels):
            raise ValueError(
                f"theta_t must have shape (batch, draws, {p.dim_obs}, {p.in_channels}); got {theta_t.shape}."
            )
        draws = theta_t.shape[1]
        vec = self._time(long_axis_last(broadcast_time(t), draws))
        if p.pooled:
            vec = vec + long_axis_last(jnp.transpose(context["pooled"])[..., None], draws)
        h = self._tokens("obs", long_axis_last(jnp.transpose(theta_t, (3, 2, 0, 1)), draws))
        run = self._joint if p.conditioning == "joint" else self._one_way
        h = run(h, vec, context, draws)
        final = weights_of(self.final_layer)
        shift, scale = linear(final["adaLN_modulation"], jax.nn.silu(vec)).reshape(2, p.hidden_size, 1, *vec.shape[1:])
        f = linear(final["linear"], modulate(h, shift, scale))
        return jnp.transpose(long_axis_last(f, draws), (2, 3, 1, 0))

    def _one_way(self, h: Tokens, vec: Float[Array, "hidden b d"], context: Context, draws: int) -> Tokens:
        """The parameters' stream, given the data's keys and values."""
        p = self.params
        turn = self._rotation("obs", p.dim_obs)
        double, single = weights_of(self.double_blocks), weights_of(self.single_blocks)
        keys = long_axis_last(jnp.transpose(context["mask"])[..., None], draws) if p.missing else None
        of_x = {name: context[name] for name in ("double", "single")}
        shared = jax.tree.map(lambda a: long_axis_last(jnp.transpose(a, (1, 3, 4, 2, 0))[..., None], draws), of_x)

        def double_step(h: Tokens, layer: Any) -> Any:
            block, parts, of_data = layer
            weights = stream(block, "obs")
            q, k, v = double_qkv(weights, h, parts, p.num_heads, turn, p.dtype)
            return double_half(
                weights, h, attention(q, [(*of_data, keys), (k, v, None)], p.dtype), parts, p.dtype
            ), None

        def single_step(h: Tokens, layer: Any) -> Any:
            block, parts, of_data = layer
            return single_block(block, h, parts, p.num_heads, turn, p.dtype, [(*of_data, keys)])[0], None

        h, _ = jax.lax.scan(_again(double_step), h, (double, modulation(double["obs_mod"], vec, 6), shared["double"]))
        h, _ = jax.lax.scan(
            _again(single_step), h, (single, modulation(single["modulation"], vec, 3), shared["single"])
        )
        return h

    def _joint(self, h: Tokens, vec: Float[Array, "hidden b d"], context: Context, draws: int) -> Tokens:
        """Both streams, the data's first, for every draw."""
        p, n = self.params, self.params.dim_cond
        turns = self._rotation("cond", n), self._rotation("obs", p.dim_obs)
        double, single = weights_of(self.double_blocks), weights_of(self.single_blocks)
        keys = None
        if p.missing:
            there = long_axis_last(jnp.transpose(context["mask"])[..., None], draws)
            keys = jnp.concatenate([there, jnp.ones((p.dim_obs, *there.shape[1:]), bool)])
        tokens = context["tokens"] if p.missing else context
        data = long_axis_last(jnp.transpose(tokens, (2, 1, 0))[..., None], draws)
        data = jnp.broadcast_to(data, (*data.shape[:2], *h.shape[2:]))

        def double_step(streams: tuple[Tokens, Tokens], layer: Any) -> Any:
            block, *parts = layer
            weights = stream(block, "cond"), stream(block, "obs")
            of_streams = [
                double_qkv(*args, p.num_heads, turn, p.dtype)  # type: ignore[call-arg]
                for *args, turn in zip(weights, streams, parts, turns, strict=True)
            ]
            q, k, v = (jnp.concatenate(pair, 2) for pair in zip(*of_streams, strict=True))
            mixed = attention(q, [(k, v, keys)], p.dtype)
            halves = zip(weights, streams, (mixed[:, :n], mixed[:, n:]), parts, strict=True)
            return tuple(double_half(*args, p.dtype) for args in halves), None

        turn = None if turns[0] is None or turns[1] is None else _both(turns[0], turns[1])

        def single_step(h: Tokens, layer: Any) -> Any:
            return single_block(*_swap(layer, h), p.num_heads, turn, p.dtype, (), keys)[0], None

        parts = modulation(double["cond_mod"], vec, 6), modulation(double["obs_mod"], vec, 6)
        streams, _ = jax.lax.scan(_again(double_step), (data, h), (double, *parts))
        h, _ = jax.lax.scan(
            _again(single_step), jnp.concatenate(streams, 1), (single, modulation(single["modulation"], vec, 3))
        )
        return h[:, n:]

    def _time(self, t: Float[Array, "b d"]) -> Float[Array, "hidden b d"]:
        return embed_vector(weights_of(self.time_in), timestep_features(t, TIME_FEATURES))

    def _tokens(self, side: str, values: Float[Array, "ch tokens batch draws"]) -> Tokens:
        """Values and ids merged, float32."""
        p = self.params
        h = linear(weights_of(getattr(self, f"{side}_in")), values.astype(jnp.float32))
        strategy = p.id_embedding_strategy[0 if side == "obs" else 1]
        if strategy.startswith(NO_TABLE) and p.id_merge_mode == "sum":
            return h
        if strategy == "none":
            table = jnp.zeros((values.shape[1], p.id_width))
        elif strategy == "absolute":
            table = weights_of(getattr(self, f"{side}_ids_embedder"))["embedding"]
        elif strategy == "pos1d":
            table = _sinusoidal(jnp.arange(values.shape[1]), p.id_width)
        else:
            table = jnp.concatenate([_sinusoidal(at, p.id_width // 2) for at in self._places(side)], 1)
        ids = table.T[:, :, None, None]
        if p.id_merge_mode == "sum":
            return math.sqrt(p.hidden_size) * h + ids
        return jnp.concatenate([h, jnp.broadcast_to(ids, (p.id_width, *h.shape[1:]))], 0)

    def _rotation(self, side: str, n: int) -> Rotation:
        """RoPE of one side: coordinates (index, side) or (side, row, column); all 0, the identity, where only the other side asks for it."""
        p, which = self.params, 0 if side == "obs" else 1
        strategy = p.id_embedding_strategy[which]
        kind = next((s for s in p.id_embedding_strategy if s.startswith("rope")), None)
        if kind is None:
            return None
        if strategy != kind:
            positions = jnp.zeros((n, 2 if kind == "rope1d" else 3))
        elif kind == "rope1d":
            positions = jnp.stack([jnp.arange(n), jnp.full(n, which)], 1)
        else:
            positions = jnp.stack([jnp.full(n, which), *self._places(side)], 1)
        return rotation(positions.astype(jnp.float32), p.axes_dim or (), float(p.theta))  # type: ignore[arg-type]

    def _places(self, side: str) -> tuple[Array, Array]:
        """Row and column of every token."""
        rows, columns = self.params.obs_grid if side == "obs" else self.params.cond_grid  # type: ignore[misc]
        return jnp.repeat(jnp.arange(rows), columns), jnp.tile(jnp.arange(columns), rows)


def _again(step: Callable[..., Any]) -> Callable[..., Any]:
    """A block that is computed again for its gradient: the scan then keeps its input alone, not every piece of its attention."""
    return jax.checkpoint(step, prevent_cse=False)  # type: ignore[return-value]


def _sinusoidal(at: Float[Array, " n"], width: int) -> Float[Array, "n width"]:
    """Vaswani et al. 1706.03762, sec. 3.5, with the sines before the cosines."""
    angles = at[:, None] * 10_000.0 ** (-jnp.arange(width // 2) / (width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)


def _both(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first, second)


def _swap(layer: tuple[Weights, Array], h: Tokens) -> tuple[Weights, Tokens, Array]:
    return layer[0], h, layer[1]
