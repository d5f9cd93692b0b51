"""Joint networks: one sequence of tokens, parameters and data alike, any of which may be given and the others drawn.

    context    = network.encode(values, mask)          what is given (0 elsewhere), and where
    prediction = network(t, v_t, context)              for all tokens; that of those which are given is not used, and their v_t are their values

`Conditional` is such a network with a fixed set of free and of given tokens: a `Network` like any other, so that every way to
sample serves every conditional.

- "joint" conditioning: all tokens attend to all, at every step and for every draw (as Simformer, Gloeckler et al. 2404.09636).
- "one_way": given tokens attend to given tokens alone and are modulated by the time 1, at every step (a constant: that of clean data, but
  for EDM, which tells the network ln(sigma) / 4), so `encode` runs them once and keeps each layer's keys and values, shared by all draws.

Under a random mask (training) which tokens are given differs from pair to pair: both kinds then run one sequence of all tokens, and
"one_way" is a matter of which keys a query sees and which time a token has.
"""

import dataclasses
from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from distsbi.networks.base import Context, Network, broadcast_time
from distsbi.networks.flux1_blocks import Heads, Source, Tokens
from distsbi.networks.weights import long_axis_last


class JointNetwork(Network):
    """The shared half of a joint network; a subclass writes its tokens, its blocks and its read-out.

    Tokens are held features first, `[hidden, tokens, batch, draws]` (see `flux1_blocks`). `dim_theta` is the number of all tokens.
    """

    conditioning: str
    num_tokens: int

    @abstractmethod
    def tokens(self, values: Float[Array, "ch tokens batch draws"], ids: Any, given: Array | None) -> Tokens:
        """Embedded values, ids (integers) and whether a token is given ([tokens, batch, draws]; None: none is), float32."""

    @abstractmethod
    def embed_time(self, t: Float[Array, "b d"]) -> Float[Array, "features b d"]:
        """What the blocks take of time."""

    @abstractmethod
    def layers(self, vec: Float[Array, "features b d"]) -> tuple[Any, Float[Array, "layers ... hidden 1 b d"]]:
        """The blocks' weights and what they make of time (for each token, or 1 for all), stacked along a leading axis."""

    @abstractmethod
    def block(
        self, h: Tokens, layer: Any, shared: list[Source], mask: Array | None
    ) -> tuple[Tokens, tuple[Heads, Heads]]:
        """One block: tokens attend to `shared` and to those of their own that `mask` names ([keys, batch, draws], or for each query).
        Also returns their keys and values."""

    @abstractmethod
    def readout(self, h: Tokens, vec: Float[Array, "features b d"]) -> Float[Array, "ch tokens batch draws"]:
        """The prediction."""

    def encode(
        self,
        values: Float[Array, "batch tokens ch"],
        mask: Bool[Array, "batch tokens"] | None = None,
        ids: tuple[int, ...] | None = None,
    ) -> Context:
        """What is given. `mask`: which of `values` are (None: all). `ids`: their token numbers (None: all tokens, in order).

        Raises ValueError if `values` has another number of tokens or channels.
        """
        numbers = self._ids(values, ids, 1)
        given = None if mask is None else jnp.transpose(mask)[:, None, :]  # [tokens, 1, batch]: one draw
        if not numbers:
            return {}
        flat = jnp.transpose(values, (2, 1, 0))[:, :, None]
        if given is not None:
            flat = jnp.where(given, flat, 0.0)
        shared: dict[str, Array] = {} if mask is None else {"mask": mask}
        on = jnp.ones(flat.shape[1:], bool) if given is None else given
        h = self.tokens(flat, numbers, on)
        if self.conditioning == "joint" or mask is not None:
            return {**shared, "tokens": jnp.transpose(h[:, :, 0], (2, 1, 0))}

        def step(h: Tokens, layer: Any) -> Any:
            return self.block(h, layer, [], None)

        layers = self.layers(self.embed_time(jnp.ones((1, 1))))
        _, kept = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), h, layers)  # type: ignore[arg-type]
        # [layers, heads, head_dim, tokens, 1, batch] -> [batch, layers, tokens, heads, head_dim]
        return {**shared, "kv": jax.tree.map(lambda a: jnp.transpose(a[..., 0, :], (4, 0, 3, 1, 2)), kept)}

    def __call__(
        self,
        t: Float[Array, "..."],
        v_t: Float[Array, "batch draws tokens ch"],
        context: Context,
        ids: tuple[int, ...] | None = None,
    ) -> Float[Array, "batch draws tokens ch"]:
        """The prediction for the tokens `ids` (None: all, of which the context's mask says which are given)."""
        numbers = self._ids(v_t, ids, 2)
        draws = v_t.shape[1]
        vec = self.embed_time(long_axis_last(broadcast_time(t), draws))
        mask = context.get("mask")
        given = None if mask is None else long_axis_last(jnp.transpose(mask)[..., None], draws)
        flat = long_axis_last(jnp.transpose(v_t, (3, 2, 0, 1)), draws)
        h = self.tokens(flat, numbers, None)
        own, count = None, h.shape[1]
        blocks, of_time = self.layers(vec)
        shared: Any = None
        clean: Any = None
        if "tokens" in context:
            held = long_axis_last(jnp.transpose(context["tokens"], (2, 1, 0))[..., None], draws)
            held = jnp.broadcast_to(held, (*held.shape[:2], *h.shape[2:]))
            if given is None:  # the given tokens beside the free ones
                h = jnp.concatenate([h, held], 1)
            else:  # the same tokens on both sides (training)
                h = jnp.where(given, held, h)
                if self.conditioning == "one_way":
                    own = given[None] | ~given[:, None]  # [queries, keys, batch, draws]
                    _, clean = self.layers(self.embed_time(jnp.ones((1, 1))))
        elif "kv" in context:
            shared = jax.tree.map(
                lambda a: long_axis_last(jnp.transpose(a, (1, 3, 4, 2, 0))[..., None], draws), context["kv"]
            )

        def step(h: Tokens, layer: Any) -> Any:
            block, of_time, clean, kept = layer
            if given is not None and clean is not None:
                of_time = jnp.where(given, clean, of_time)
            return self.block(h, (block, of_time), [] if kept is None else [(*kept, None)], own)[0], None

        layers = (blocks, of_time, clean, shared)
        h, _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), h, layers)  # type: ignore[arg-type]
        f = self.readout(h[:, :count], vec)
        return jnp.transpose(long_axis_last(f, draws), (2, 3, 1, 0))

    def _ids(self, values: Array, ids: tuple[int, ...] | None, axis: int) -> tuple[int, ...]:
        numbers = tuple(range(self.num_tokens)) if ids is None else ids
        if values.ndim != axis + 2 or values.shape[axis:] != (len(numbers), self.ch_theta):
            raise ValueError(
                f"values must have {len(numbers)} tokens of {self.ch_theta} channels on their last two axes; got {values.shape}."
            )
        return numbers


@dataclasses.dataclass(frozen=True)
class Completed:
    """A user's own joint module, which sees of the tokens that are given their values without noise, and of the others nothing but what is
    drawn: in training as when it draws."""

    network: Any

    def encode(self, values: Float[Array, "batch tokens ch"], mask: Bool[Array, "batch tokens"]) -> Context:
        values = jnp.where(mask[..., None], values, 0.0)
        return values, mask, self.network.encode(values, mask)

    def __call__(self, t: Float[Array, "..."], v_t: Float[Array, "batch draws tokens ch"], context: Context) -> Array:
        values, mask, inner = context
        return self.network(t, jnp.where(mask[:, None, :, None], values[:, None], v_t), inner)


class Conditional(Network):
    """p(free tokens | given tokens) of a joint network: encode takes the given ones alone, [batch, given, ch].

    A `JointNetwork` works on the tokens that take part. Any other module with `encode(values, mask)` and `__call__(t, v_t, context)`
    over all tokens is given all of them (see `Completed`).

    Raises ValueError for tokens that do not exist or are both free and given, and for none that is free.
    """

    def __init__(self, network: Any, free: tuple[int, ...], given: tuple[int, ...]):
        free, given = tuple(free), tuple(given)
        wrong = sorted({i for i in (*free, *given) if not 0 <= i < network.num_tokens})
        if wrong or set(free) & set(given) or not free or len(set(free)) + len(set(given)) != len(free) + len(given):
            raise ValueError(
                f"free {free} and given {given} must be different tokens from 0 to {network.num_tokens - 1}, at least one of them free."
            )
        self.network, self.free, self.given = network, free, given
        self.params = getattr(network, "params", None)
        self.dim_theta, self.ch_theta = len(free), network.ch_theta
        self.dim_x, self.ch_x = len(given), network.ch_theta

    def encode(self, x: Float[Array, "batch given ch"]) -> Context:
        if isinstance(self.network, JointNetwork):
            return self.network.encode(x, None, self.given)
        values = jnp.zeros((x.shape[0], self.network.num_tokens, self.ch_x)).at[:, list(self.given)].set(x)
        mask = np.isin(np.arange(self.network.num_tokens), self.given)
        return Completed(self.network).encode(values, jnp.broadcast_to(mask, values.shape[:2]))

    def __call__(
        self, t: Float[Array, "..."], theta_t: Float[Array, "batch draws free ch"], context: Context
    ) -> Float[Array, "batch draws free ch"]:
        if isinstance(self.network, JointNetwork):
            return self.network(t, theta_t, context, self.free)
        v_t = (
            jnp.zeros((*theta_t.shape[:2], self.network.num_tokens, self.ch_theta))
            .at[:, :, list(self.free)]
            .set(theta_t)
        )
        return Completed(self.network)(t, v_t, context)[:, :, list(self.free)]


class Unconditional(Network):
    """p(all tokens) of a joint network, as a `Network` whose x is one number without meaning."""

    def __init__(self, network: JointNetwork):
        self.network, self.params = network, network.params
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = network.num_tokens, network.ch_theta, 1, 1

    def encode(self, x: Float[Array, "batch 1 1"]) -> Context:
        return {}

    def __call__(
        self, t: Float[Array, "..."], theta_t: Float[Array, "batch draws tokens ch"], context: Context
    ) -> Float[Array, "batch draws tokens ch"]:
        return self.network(t, theta_t, context)
