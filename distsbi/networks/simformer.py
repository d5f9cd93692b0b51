"""Simformer: a transformer over one sequence of tokens, any of which may be given.

    token_i = [value embedding, id_i, c given_i]
    h <- LN(h) + attention(LN(h)),    h <- LN(h) + MLP(LN(h)) + gelu(W_t features(t)),    f = W_out LN(h)

Gloeckler et al. 2404.09636; the variant, and the field names, are GenSBI's, whose function and, block by block, whose parameter
tree this is with `conditioning="joint"`.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distsbi.networks.base import CONDITIONINGS, DTYPES, NetworkParams, precision
from distsbi.networks.flux1_blocks import Heads, Source, Tokens, attention, linear
from distsbi.networks.flux1_joint import check_channels
from distsbi.networks.joint import JointNetwork
from distsbi.networks.weights import Maker, weights_of

SKIP = 0.01  # initial share of the raw value in its embedding, and size of the mark of a given token


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimformerParams(NetworkParams):
    """Size of a `Simformer`, with GenSBI's field names.

    Args:
        in_channels, dim_joint: channels per token, number of tokens (parameters and data).
        val_emb_dim, id_emb_dim, cond_emb_dim: features of a token's value, id and mark of being given; their sum is the width.
        num_heads, depth: attention heads, layers. qkv_features: of all heads; None: the width.
        fourier_features: of time. mlp_ratio, num_hidden_layers: hidden units of the MLPs over the width, and their layers.
        conditioning: "one_way" or "joint" (see `networks.joint`).
        dtype, param_dtype: inputs of the MLPs' matrix products, and weights (trained in float32).
        rngs: used to initialise the weights; no part of equality, hash or the stored dictionary.

    Raises ValueError for sizes that do not fit together.
    """

    in_channels: int
    dim_joint: int
    val_emb_dim: int
    id_emb_dim: int
    cond_emb_dim: int
    num_heads: int
    depth: int
    num_hidden_layers: int = 1
    fourier_features: int = 128
    mlp_ratio: int = 3
    qkv_features: int | None = None
    rngs: nnx.Rngs | None = dataclasses.field(default=None, compare=False, repr=False)
    param_dtype: str = "float32"
    dtype: str = "float32"
    conditioning: str = "one_way"

    def __post_init__(self) -> None:
        if self.qkv_features is None:
            object.__setattr__(self, "qkv_features", self.hidden_size)
        for name in (
            "in_channels", "dim_joint", "val_emb_dim", "id_emb_dim", "num_heads", "depth", "num_hidden_layers", "mlp_ratio", "qkv_features",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"SimformerParams.{name} must be at least 1; got {getattr(self, name)}.")
        self._name_dtypes()
        for name, known in (("dtype", DTYPES), ("param_dtype", DTYPES), ("conditioning", CONDITIONINGS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"SimformerParams.{name} must be {' or '.join(map(repr, known))}; got {getattr(self, name)!r}."
                )
        if (self.qkv_features or 0) % self.num_heads or self.val_emb_dim % self.in_channels or self.cond_emb_dim < 0:
            raise ValueError(
                f"SimformerParams needs qkv_features a multiple of num_heads, val_emb_dim a multiple of in_channels, and cond_emb_dim "
                f">= 0; got {self.qkv_features} and {self.num_heads}, {self.val_emb_dim} and {self.in_channels}, {self.cond_emb_dim}."
            )

    @property
    def hidden_size(self) -> int:
        return self.val_emb_dim + self.id_emb_dim + self.cond_emb_dim

    @classmethod
    def default(cls, dim_obs: int, dim_cond: int, ch_obs: int = 1, ch_cond: int = 1) -> Self:
        """A small network for `dim_obs` parameters and `dim_cond` data. Raises ValueError if their channels differ."""
        check_channels(ch_obs, ch_cond)
        return cls(
            in_channels=ch_obs, dim_joint=dim_obs + dim_cond, val_emb_dim=24 * ch_obs, id_emb_dim=24, cond_emb_dim=16,
            num_heads=8, depth=6, mlp_ratio=2,
        )  # fmt: skip


class Simformer(JointNetwork):
    """The transformer. Layers are stacked and scanned; at initialisation the prediction is 0."""

    cpu_compiler_options = {"xla_cpu_experimental_ynn_fusion_type": ""}  # noqa: RUF012  (see Flux1)

    def __init__(self, params: SimformerParams, rngs: nnx.Rngs | None = None):
        rngs = next(r for r in (rngs, params.rngs, nnx.Rngs(0)) if r is not None)
        self.params = p = dataclasses.replace(params, rngs=None)
        self.conditioning, self.num_tokens = p.conditioning, p.dim_joint
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = p.dim_joint, p.in_channels, 0, p.in_channels
        make, width, n = Maker(rngs, jnp.dtype(p.param_dtype)), p.hidden_size, p.depth
        qkv = p.qkv_features or width
        self.embedding_net_value = nnx.Dict(
            p_skip=make.constant(SKIP, 1, 1, p.val_emb_dim),
            in_layer=make.dense(p.in_channels, p.val_emb_dim), out_layer=make.dense(p.val_emb_dim, p.val_emb_dim),
        )  # fmt: skip
        self.embedding_time = nnx.Dict(B=make.normal(1.0, p.fourier_features // 2 + 1, 1))
        self.embedding_net_id = nnx.Dict(embedding=make.normal(1.0, p.dim_joint, p.id_emb_dim))
        if p.cond_emb_dim:
            self.condition_embedding = make.constant(SKIP, 1, 1, p.cond_emb_dim)
        inner = p.mlp_ratio * width
        self.blocks = nnx.Dict(
            attention=nnx.Dict(
                layer_norm=make.layer_norm(width, n),
                query=make.dense(width, qkv, n), key=make.dense(width, qkv, n), value=make.dense(width, qkv, n),
                out=make.dense(qkv, width, n),
            ),
            dense=nnx.Dict(
                layer_norm=make.layer_norm(width, n),
                first=make.dense(width, inner, n), last=make.dense(inner, width, n),
                context_block=make.dense(p.fourier_features, width, n),
                **({"middle": make.dense(inner, inner, n, p.num_hidden_layers - 1)} if p.num_hidden_layers > 1 else {}),
            ),
        )  # fmt: skip
        self.layer_norm = make.layer_norm(width)
        self.output_fn = make.dense(width, p.in_channels, scale=0.0)

    def tokens(self, values: Float[Array, "ch tokens batch draws"], ids: Any, given: Array | None) -> Tokens:
        net = weights_of(self.embedding_net_value)
        values = values.astype(jnp.float32)
        skip = net["p_skip"][0, 0][:, None, None, None]
        made = linear(net["out_layer"], jax.nn.silu(linear(net["in_layer"], values)))
        repeats = self.params.val_emb_dim // self.params.in_channels
        h = jnp.repeat(values, repeats, axis=0) * skip + (1.0 - skip) * made
        id_part = self.embedding_net_id["embedding"][...].astype(jnp.float32)[jnp.asarray(ids)].T[:, :, None, None]
        flag = jnp.zeros((0, 1, 1, 1))
        if hasattr(self, "condition_embedding"):
            flag = self.condition_embedding[...].astype(jnp.float32)[0, 0][:, None, None, None]
            flag = flag * (0.0 if given is None else given.astype(jnp.float32))
        wide = lambda a: jnp.broadcast_to(a, (a.shape[0], *h.shape[1:]))  # noqa: E731
        return jnp.concatenate([h, wide(id_part), wide(flag)], 0)

    def embed_time(self, t: Float[Array, "b d"]) -> Float[Array, "features b d"]:
        angles = 2 * jnp.pi * t * self.embedding_time["B"][...].astype(jnp.float32)[:, 0][:, None, None]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 0)[: self.params.fourier_features]

    def layers(self, vec: Float[Array, "features b d"]) -> Any:
        blocks = weights_of(self.blocks)
        context = blocks["dense"]["context_block"]
        of_time = (
            jnp.tensordot(context["kernel"], vec, 1, precision=precision("float32")) + context["bias"][..., None, None]
        )
        return blocks, jax.nn.gelu(of_time)[:, :, None]

    def block(
        self, h: Tokens, layer: Any, shared: list[Source], mask: Array | None
    ) -> tuple[Tokens, tuple[Heads, Heads]]:
        (block, of_time), heads = layer, self.params.num_heads
        attn, dense, dtype = block["attention"], block["dense"], self.params.dtype
        h = _norm(attn["layer_norm"], h)
        q, k, v = (linear(attn[name], h).reshape(heads, -1, *h.shape[1:]) for name in ("query", "key", "value"))
        h = h + linear(attn["out"], attention(q * q.shape[1] ** -0.5, [*shared, (k, v, mask)], "float32"))
        h = _norm(dense["layer_norm"], h)
        inner = jax.nn.gelu(linear(dense["first"], h, dtype))
        for i in range(self.params.num_hidden_layers - 1):
            inner = jax.nn.gelu(linear(jax.tree.map(lambda a, i=i: a[i], dense["middle"]), inner, dtype))
        return h + linear(dense["last"], inner, dtype) + of_time, (k, v)

    def readout(self, h: Tokens, vec: Float[Array, "features b d"]) -> Float[Array, "ch tokens batch draws"]:
        return linear(weights_of(self.output_fn), _norm(weights_of(self.layer_norm), h))


def _norm(weights: dict[str, Array], h: Tokens) -> Tokens:
    centred = h - h.mean(0, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(centred**2, 0, keepdims=True) + 1e-6)
    return unit * weights["scale"][:, None, None, None] + weights["bias"][:, None, None, None]
