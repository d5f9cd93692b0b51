"""Flux1Joint: Flux1's single-stream blocks over one sequence of tokens, any of which may be given.

    token_i = [W v_i + b, c given_i, id_i]   ("concat"),    sqrt(hidden) (W v_i + b) + id_i + c given_i   ("sum")

GenSBI's model of that name, and its field names; with `conditioning="joint"` its function and, block by block, its parameter tree.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distsbi.networks.base import CONDITIONINGS, DTYPES, NetworkParams
from distsbi.networks.flux1_blocks import (
    Heads,
    Source,
    Tokens,
    embed_vector,
    linear,
    modulate,
    modulation,
    single_block,
)
from distsbi.networks.joint import JointNetwork
from distsbi.networks.weights import TIME_FEATURES, Maker, timestep_features, weights_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux1JointParams(NetworkParams):
    """Size of a `Flux1Joint`, with GenSBI's field names.

    Args:
        in_channels, dim_joint: channels per token, number of tokens (parameters and data).
        num_heads, depth_single_blocks: attention heads, blocks.
        val_emb_dim: features per head of a token's value; with "sum" the head's width.
        cond_emb_dim, id_emb_dim: features per head of "given" and of the id; "concat" only.
        mlp_ratio: hidden units of the MLPs over the width.
        id_merge_mode: "sum" or "concat". id_embedding_strategy: "absolute".
        conditioning: "one_way" or "joint" (see `networks.joint`).
        dtype, param_dtype: inputs of the blocks' matrix products, and weights (trained in float32).
        rngs: used to initialise the weights; no part of equality, hash or the stored dictionary.
        qkv_bias, vec_in_dim, guidance_embed: accepted for GenSBI's sake, where they have no effect either.

    Raises ValueError for sizes that do not fit together.
    """

    in_channels: int
    dim_joint: int
    num_heads: int
    depth_single_blocks: int
    val_emb_dim: int
    cond_emb_dim: int = 0
    id_emb_dim: int = 0
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    vec_in_dim: int | None = None
    rngs: nnx.Rngs | None = dataclasses.field(default=None, compare=False, repr=False)
    id_merge_mode: str = "sum"
    id_embedding_strategy: str = "absolute"
    guidance_embed: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"
    conditioning: str = "one_way"

    def __post_init__(self) -> None:
        for name in ("in_channels", "dim_joint", "num_heads", "depth_single_blocks", "val_emb_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"Flux1JointParams.{name} must be at least 1; got {getattr(self, name)}.")
        self._name_dtypes()
        for name, known in (
            ("dtype", DTYPES), ("param_dtype", DTYPES), ("conditioning", CONDITIONINGS),
            ("id_merge_mode", ("sum", "concat")), ("id_embedding_strategy", ("absolute",)), ("guidance_embed", (False,)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Flux1JointParams.{name} must be {' or '.join(map(repr, known))}; got {getattr(self, name)!r}."
                )
        if self.id_merge_mode == "sum":
            object.__setattr__(self, "cond_emb_dim", 0)
            object.__setattr__(self, "id_emb_dim", 0)
        elif self.id_emb_dim < 1 or self.cond_emb_dim < 0:
            raise ValueError(
                f'id_merge_mode="concat" needs id_emb_dim >= 1 and cond_emb_dim >= 0; got {self.id_emb_dim} and {self.cond_emb_dim}.'
            )

    @property
    def head_dim(self) -> int:
        return self.val_emb_dim + self.cond_emb_dim + self.id_emb_dim

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def default(cls, dim_obs: int, dim_cond: int, ch_obs: int = 1, ch_cond: int = 1) -> Self:
        """A small network for `dim_obs` parameters and `dim_cond` data. Raises ValueError if their channels differ."""
        check_channels(ch_obs, ch_cond)
        return cls(in_channels=ch_obs, dim_joint=dim_obs + dim_cond, num_heads=8, depth_single_blocks=6, val_emb_dim=8)


def check_channels(ch_obs: int, ch_cond: int) -> None:
    if ch_obs != ch_cond:
        raise ValueError(
            f"a joint model holds parameters and data in one sequence, so they need the same channels; got ch_obs {ch_obs} and "
            f"ch_cond {ch_cond}."
        )


class Flux1Joint(JointNetwork):
    """The transformer. Blocks are stacked and scanned; at initialisation the prediction is 0 (adaLN-zero)."""

    cpu_compiler_options = {"xla_cpu_experimental_ynn_fusion_type": ""}  # noqa: RUF012  (see Flux1)

    def __init__(self, params: Flux1JointParams, rngs: nnx.Rngs | None = None):
        rngs = next(r for r in (rngs, params.rngs, nnx.Rngs(0)) if r is not None)
        self.params = p = dataclasses.replace(params, rngs=None)
        self.conditioning, self.num_tokens = p.conditioning, p.dim_joint
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = p.dim_joint, p.in_channels, 0, p.in_channels
        make, hidden, n = Maker(rngs, jnp.dtype(p.param_dtype)), p.hidden_size, p.depth_single_blocks
        is_sum = p.id_merge_mode == "sum"
        self.obs_in = make.token_in(p.in_channels, p.num_heads * p.val_emb_dim, hidden**-0.5 if is_sum else 1.0)
        self.ids_embedder = nnx.Dict(
            embedding=make.normal(1.0, p.dim_joint, hidden if is_sum else p.num_heads * p.id_emb_dim)
        )
        if is_sum or p.cond_emb_dim:
            self.condition_embedding = make.constant(0.01, 1, 1, hidden if is_sum else p.num_heads * p.cond_emb_dim)
        self.time_in = nnx.Dict(in_layer=make.dense(TIME_FEATURES, hidden), out_layer=make.dense(hidden, hidden))
        self.single_blocks = nnx.Dict(
            linear1=make.dense(hidden, 3 * hidden + p.mlp_width, n),
            linear2=make.dense(hidden + p.mlp_width, hidden, n),
            norm=make.qk_norm(p.head_dim, n),
            modulation=nnx.Dict(lin=make.dense(hidden, 3 * hidden, n, scale=0.0)),
        )
        self.final_layer = nnx.Dict(
            linear=make.dense(hidden, p.in_channels, scale=0.0),
            adaLN_modulation=make.dense(hidden, 2 * hidden, scale=0.0),
        )

    def tokens(self, values: Float[Array, "ch tokens batch draws"], ids: Any, given: Array | None) -> Tokens:
        p = self.params
        h = linear(weights_of(self.obs_in), values.astype(jnp.float32))
        id_part = self.ids_embedder["embedding"][...].astype(jnp.float32)[jnp.asarray(ids)].T[:, :, None, None]
        flag = jnp.zeros((0, 1, 1, 1))
        if hasattr(self, "condition_embedding"):
            flag = self.condition_embedding[...].astype(jnp.float32)[0, 0][:, None, None, None]
            flag = flag * (0.0 if given is None else given.astype(jnp.float32))
        if p.id_merge_mode == "sum":
            return math.sqrt(p.hidden_size) * h + id_part + flag
        wide = lambda a: jnp.broadcast_to(a, (a.shape[0], *h.shape[1:]))  # noqa: E731
        return jnp.concatenate([h, wide(flag), wide(id_part)], 0)

    def embed_time(self, t: Float[Array, "b d"]) -> Float[Array, "hidden b d"]:
        return embed_vector(weights_of(self.time_in), timestep_features(t, TIME_FEATURES))

    def layers(self, vec: Float[Array, "hidden b d"]) -> Any:
        blocks = weights_of(self.single_blocks)
        return blocks, modulation(blocks["modulation"], vec, 3)

    def block(
        self, h: Tokens, layer: Any, shared: list[Source], mask: Array | None
    ) -> tuple[Tokens, tuple[Heads, Heads]]:
        block, parts = layer
        return single_block(block, h, parts, self.params.num_heads, None, self.params.dtype, shared, mask)

    def readout(self, h: Tokens, vec: Float[Array, "hidden b d"]) -> Float[Array, "ch tokens batch draws"]:
        final = weights_of(self.final_layer)
        parts = linear(final["adaLN_modulation"], jax.nn.silu(vec))
        shift, scale = parts.reshape(2, self.params.hidden_size, 1, *vec.shape[1:])
        return linear(final["linear"], modulate(h, shift, scale))
