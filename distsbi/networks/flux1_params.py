"""The sizes of a `Flux1`, and which of them fit together."""

import dataclasses
import math
from typing import Any, Self

from flax import nnx

from distsbi.hints import as_number
from distsbi.networks.base import CONDITIONINGS, DTYPES, NetworkParams

ID_STRATEGIES = ("absolute", "pos1d", "pos2d", "rope1d", "rope2d", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flux1Params(NetworkParams):
    """Size of a `Flux1`, with GenSBI's field names: "obs" are the parameters, "cond" the data.

    Args:
        in_channels, dim_obs: channels per parameter, number of parameters.
        context_in_dim, dim_cond: channels per datum, number of data.
        num_heads: attention heads.
        axes_dim: for "sum", features per head, in parts whose sum is the head's width. RoPE turns each part with its own coordinate:
            two for "rope1d", (of the position, of the side), three for "rope2d", (of the side, of the row, of the column).
        val_emb_dim, id_emb_dim: for "concat", features per head of the value and of the id.
        mlp_ratio: hidden units of the MLPs over the width.
        depth, depth_single_blocks: double and single blocks, at least one of each.
        qkv_bias: biases of q, k, v in the double blocks.
        id_embedding_strategy: of (parameters, data): "absolute" (learned), "pos1d" (sine and cosine of the index), "pos2d" (of row and
            column), "rope1d" or "rope2d"; of the data also "none": they are a set, whose order does not matter.
        obs_grid, cond_grid: (rows, columns) of the tokens, for the strategies in two dimensions; None: a square.
        id_merge_mode: "sum" or "concat".
        theta: base of RoPE's frequencies, positive; None, or -1 (GenSBI's word), for 10 (dim_obs + dim_cond).
        conditioning: "one_way" or "joint", see `networks.flux1`.
        pooled: with "one_way", the mean of the data's last tokens joins the time in vec, as a pooled prompt does in FLUX.1. Not in GenSBI's network.
        dtype: inputs of the blocks' matrix products, "float32" or "bfloat16" (accumulated in float32). param_dtype: of the weights,
            which are trained in float32.
        missing: data tokens may be missing; then no token attends to them.
        rngs: used to initialise the weights; no part of equality, hash or the stored dictionary.
        vec_in_dim, guidance_embed: accepted for GenSBI's sake; guidance itself is not supported.

    Raises ValueError for sizes that do not fit together.
    """

    in_channels: int
    context_in_dim: int
    num_heads: int
    depth: int
    depth_single_blocks: int
    dim_obs: int
    dim_cond: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    vec_in_dim: int | None = None
    rngs: nnx.Rngs | None = dataclasses.field(default=None, compare=False, repr=False)
    axes_dim: tuple[int, ...] | None = None
    val_emb_dim: int | None = None
    id_emb_dim: int | None = None
    id_merge_mode: str = "sum"
    theta: int | None = None
    id_embedding_strategy: tuple[str, str] = ("absolute", "absolute")
    guidance_embed: bool = False
    param_dtype: str = "float32"
    dtype: str = "float32"
    conditioning: str = "one_way"
    pooled: bool = False
    missing: bool = False
    obs_grid: tuple[int, int] | None = None
    cond_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in (
            "in_channels",
            "context_in_dim",
            "num_heads",
            "depth",
            "depth_single_blocks",
            "dim_obs",
            "dim_cond",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"Flux1Params.{name} must be at least 1; got {getattr(self, name)}.")
        put("id_embedding_strategy", tuple(self.id_embedding_strategy))
        put("axes_dim", None if self.axes_dim is None else tuple(int(n) for n in self.axes_dim))
        put("theta", 10 * (self.dim_obs + self.dim_cond) if self.theta in (None, -1) else self.theta)
        number = as_number("Flux1Params.theta", self.theta)
        put("theta", number)
        if not 0 < number < math.inf:
            raise ValueError(
                f"Flux1Params.theta must be positive, or None for 10 (dim_obs + dim_cond); got {self.theta}."
            )
        self._name_dtypes()
        for name in ("dtype", "param_dtype"):
            _one_of(name, getattr(self, name), DTYPES)
        _one_of("conditioning", self.conditioning, CONDITIONINGS)
        if self.pooled and self.conditioning == "joint":
            raise ValueError('Flux1Params.pooled goes with conditioning="one_way"; leave it out.')
        _one_of("id_merge_mode", self.id_merge_mode, ("sum", "concat"))
        if len(self.id_embedding_strategy) != 2:
            raise ValueError(
                f"Flux1Params.id_embedding_strategy is a pair (parameters, data); got {self.id_embedding_strategy}."
            )
        for strategy in self.id_embedding_strategy:
            _one_of("id_embedding_strategy", strategy, ID_STRATEGIES)
        if self.id_embedding_strategy[0] == "none":
            raise ValueError(
                'id_embedding_strategy "none" is for data alone: parameters without ids could not be told apart.'
            )
        if self.guidance_embed:
            raise ValueError("Flux1 takes no guidance; set guidance_embed=False.")
        for name, dim, strategy in zip(
            ("obs_grid", "cond_grid"), (self.dim_obs, self.dim_cond), self.id_embedding_strategy, strict=True
        ):
            put(name, _grid(name, getattr(self, name), dim, strategy.endswith("2d")))
        self._check_width()

    def _check_width(self) -> None:
        ropes = {strategy for strategy in self.id_embedding_strategy if strategy.startswith("rope")}
        rope = bool(ropes)
        if self.id_merge_mode == "sum":
            if not self.axes_dim or min(self.axes_dim) < 0 or sum(self.axes_dim) < 1:
                raise ValueError(
                    f'id_merge_mode="sum" needs axes_dim, the features per head, such as (8, 0); got {self.axes_dim}.'
                )
            if len(ropes) > 1:
                raise ValueError(
                    '"rope1d" and "rope2d" turn heads by other coordinates; use one of them on both sides, or "absolute".'
                )
            count, what = (
                (3, "side, row, column), such as (2, 4, 4")
                if "rope2d" in ropes
                else (2, "position, side), such as (6, 2")
            )
            if rope and (len(self.axes_dim) != count or any(n % 2 for n in self.axes_dim)):
                raise ValueError(f"{min(ropes)!r} needs {count} even axes_dim, ({what}); got {self.axes_dim}.")
        else:
            if rope:
                raise ValueError(
                    f'{min(ropes)!r} rotates whole heads and goes with id_merge_mode="sum"; use it, or "absolute", "pos1d" or "pos2d".'
                )
            if not self.val_emb_dim or not self.id_emb_dim or min(self.val_emb_dim, self.id_emb_dim) < 1:
                given = (self.val_emb_dim, self.id_emb_dim)
                raise ValueError(
                    f'id_merge_mode="concat" needs val_emb_dim and id_emb_dim, features per head, such as 4 and 4; got {given}.'
                )
        if "pos1d" in self.id_embedding_strategy and self.id_width % 2:
            raise ValueError(
                f'"pos1d" needs an even width of the ids; got {self.id_width}. Change num_heads or the features per head.'
            )
        if "pos2d" in self.id_embedding_strategy and self.id_width % 4:
            raise ValueError(
                f'"pos2d" needs a width of the ids that 4 divides; got {self.id_width}. Change num_heads or the features per head.'
            )
        if self.mlp_width < 1:
            raise ValueError(f"Flux1Params.mlp_ratio must be at least 1 / hidden_size; got {self.mlp_ratio}.")

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return (
            sum(self.axes_dim or ())
            if self.id_merge_mode == "sum"
            else (self.val_emb_dim or 0) + (self.id_emb_dim or 0)
        )

    @property
    def hidden_size(self) -> int:
        """Features per token."""
        return self.num_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Features made from a token's value."""
        return self.hidden_size if self.id_merge_mode == "sum" else self.num_heads * (self.val_emb_dim or 0)

    @property
    def id_width(self) -> int:
        """Features of a token's id."""
        return self.hidden_size if self.id_merge_mode == "sum" else self.num_heads * (self.id_emb_dim or 0)

    @property
    def mlp_width(self) -> int:
        """Hidden units of the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The fields without `rngs`, JSON-able; `pooled` only where it is so, for there are runs of before there was such a thing."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        fields = {name: value for name, value in fields.items() if name != "pooled" or value}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def default(cls, dim_obs: int, dim_cond: int, ch_obs: int = 1, ch_cond: int = 1) -> Self:
        """A small network, sized for minutes of training on a few CPU cores."""
        return cls(
            in_channels=ch_obs, context_in_dim=ch_cond, dim_obs=dim_obs, dim_cond=dim_cond,
            num_heads=8, axes_dim=(8, 0), depth=2, depth_single_blocks=4, mlp_ratio=2.0,
        )  # fmt: skip


def _grid(name: str, grid: tuple[int, int] | None, dim: int, wanted: bool) -> tuple[int, int] | None:
    """Rows and columns of `dim` tokens. Raises ValueError where they do not multiply to it."""
    if not wanted:
        return None if grid is None else (int(grid[0]), int(grid[1]))
    side = math.isqrt(dim)
    rows, columns = (side, side) if grid is None else map(int, grid)
    if rows * columns != dim:
        raise ValueError(f"Flux1Params.{name} must be (rows, columns) of {dim} tokens; got {grid}.")
    return rows, columns


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Flux1Params.{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
