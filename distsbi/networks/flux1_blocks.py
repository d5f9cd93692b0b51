"""The transformer blocks of Flux1 as pure functions of (weights, tokens).

    modulate(h; shift, scale) = (1 + scale) LN(h) + shift                              adaLN, Peebles & Xie 2212.09748
    double block:  h <- h + gate_1 proj(attention),  h <- h + gate_2 mlp(modulate(h))  one set of weights per stream
    single block:  h <- h + gate W_2 [attention, gelu(m)],  [q, k, v, m] = W_1 modulate(h)   parallel: 2302.05442
    attention:     softmax(q k / sqrt(e)) v, q and k RMS-normed, then rotated            RoPE, Su et al. 2104.09864

Tokens are held features first, `[hidden, tokens, batch, draws]`: every matrix product is one `W @ h` over all tokens of all
draws, and norms, softmax and attention of short sequences are element-wise over the long contiguous axes (batch, draws).
An axis draws of length 1 means "shared by all draws" and is broadcast, never copied.
"""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distsbi.networks.base import precision

Weights = dict[str, Any]  # nested; kernels are [out, in] here, stacked blocks have a leading axis
Tokens = Float[Array, "hidden tokens batch draws"]
Heads = Float[Array, "heads head_dim tokens batch draws"]
# Keys, values, and which keys there are: [tokens, batch, draws], or [queries, tokens, batch, draws]; None: all.
Source = tuple[Heads, Heads, Array | None]
Rotation = tuple[Float[Array, "half tokens"], Float[Array, "half tokens"]] | None

NORM_EPS = 1e-6
NO_KEY = -1e30  # the logit of a key that is not there
# Above these sizes attention is two batched matrix products; below, a sum of element-wise products. XLA's CPU backend runs
# a product of 128 x 8 x 8 batches of [2, 8] @ [8, 2] as a scalar loop: 3.9 ms where the element-wise form takes 0.5 ms. With 8
# or 13 keys it is the other way: a gradient takes 0.57 and 0.60 of the time (Flux1Joint and Simformer, AMD EPYC, jax 0.10.2).
ELEMENTWISE_KEYS = 4
ELEMENTWISE_HEAD_DIM = 32


def linear(weights: Weights, x: Float[Array, "i ..."], dtype: str = "float32") -> Float[Array, "o ..."]:
    """kernel @ x + bias over the leading axis; inputs of the compute dtype, accumulated in float32."""
    y = jnp.tensordot(
        weights["kernel"].astype(dtype), x.astype(dtype), 1,
        precision=precision(dtype), preferred_element_type=jnp.float32,
    )  # fmt: skip
    if "bias" not in weights:
        return y
    return y + weights["bias"].reshape((-1,) + (1,) * (x.ndim - 1))


def layer_norm(h: Float[Array, "hidden ..."]) -> Float[Array, "hidden ..."]:
    """Layer norm over the features, without scale and bias."""
    centred = h - h.mean(0, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, 0, keepdims=True) + NORM_EPS)


def embed_vector(weights: Weights, features: Float[Array, "i ..."]) -> Float[Array, "hidden ..."]:
    """The two-layer embedding of time, float32."""
    return linear(weights["out_layer"], jax.nn.silu(linear(weights["in_layer"], features)))


def modulation(
    weights: Weights, vec: Float[Array, "hidden b d"], parts: int
) -> Float[Array, "layers parts hidden 1 b d"]:
    """shift, scale and gate of all stacked blocks in one product, float32. b and d are 1 where time is shared."""
    kernel, bias = (
        weights["lin"]["kernel"],
        weights["lin"]["bias"],
    )  # [layers, parts * hidden, hidden], [layers, parts * hidden]
    out = jnp.tensordot(kernel, jax.nn.silu(vec), 1, precision=precision("float32")) + bias[..., None, None]
    return out.reshape(kernel.shape[0], parts, -1, 1, *vec.shape[1:])


def modulate(h: Tokens, shift: Tokens, scale: Tokens) -> Tokens:
    return (1.0 + scale) * layer_norm(h) + shift


def rotation(positions: Float[Array, "tokens axes"], axes_dim: Sequence[int], base: float) -> Rotation:
    """cos and sin of the angle of each pair of features: `axes_dim[a]` features turn with position a at rates base^(-2i/dim)."""
    angles = [
        positions[:, a] * base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / max(dim, 1))[:, None]
        for a, dim in enumerate(axes_dim)
    ]
    stacked = jnp.concatenate(angles, 0)
    return jnp.cos(stacked), jnp.sin(stacked)


def rotate(x: Heads, turn: Rotation) -> Heads:
    """RoPE on neighbouring pairs of features."""
    if turn is None:
        return x
    heads, head_dim, *rest = x.shape
    pairs = x.reshape(heads, head_dim // 2, 2, *rest)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    cos, sin = (a[..., None, None] for a in turn)
    return jnp.stack([cos * first - sin * second, sin * first + cos * second], 2).reshape(x.shape)


def queries_keys_values(weights: Weights, qkv: Tokens, heads: int, turn: Rotation) -> tuple[Heads, Heads, Heads]:
    """Split, RMS-norm and rotate; queries carry the factor 1 / sqrt(head_dim)."""
    q, k, v = qkv.reshape(3, heads, -1, *qkv.shape[1:])
    q = rotate(_rms_norm(q, weights["query_norm"]["scale"]), turn) * q.shape[1] ** -0.5
    return q, rotate(_rms_norm(k, weights["key_norm"]["scale"]), turn), v


def attention(q: Heads, sources: Sequence[Source], dtype: str) -> Tokens:
    """One softmax over the keys of all sources. A source with draws = 1 is shared by all draws, without a copy. A query that
    has no key at all gets zeros."""
    sources = [source for source in sources if source[0].shape[2]]
    lengths = [k.shape[2] for k, _, _ in sources]
    elementwise = q.shape[1] <= ELEMENTWISE_HEAD_DIM and sum(lengths) <= ELEMENTWISE_KEYS
    scores, mix, axis = (_few_scores, _few_mix, 2) if elementwise else (_many_scores, _many_mix, 4)
    logits = jnp.concatenate([scores(q, k, mask, dtype) for k, _, mask in sources], axis)
    weights = jax.nn.softmax(logits, axis=axis)
    if any(mask is not None for _, _, mask in sources):
        weights = jnp.where(logits > NO_KEY / 2, weights, 0.0)
    parts = jnp.split(weights, np.cumsum(lengths)[:-1].tolist(), axis=axis)
    mixed = _total(mix(part, v, dtype) for part, (_, v, _) in zip(parts, sources, strict=True))
    return mixed.reshape(-1, *q.shape[2:])


def _masked(logits: Array, mask: Array | None) -> Array:
    return logits if mask is None else jnp.where(mask, logits, NO_KEY)


def double_half(
    weights: Weights, h: Tokens, mixed: Tokens, parts: Float[Array, "6 hidden 1 b d"], dtype: str
) -> Tokens:
    """One stream of a double block after the attention: projection and MLP, both gated."""
    _, _, gate_1, shift, scale, gate_2 = parts
    h = h + gate_1 * linear(weights["attn"]["proj"], mixed, dtype)
    inner = jax.nn.gelu(linear(weights["mlp"]["in_layer"], modulate(h, shift, scale), dtype))
    return h + gate_2 * linear(weights["mlp"]["out_layer"], inner, dtype)


def double_qkv(
    weights: Weights, h: Tokens, parts: Float[Array, "6 hidden 1 b d"], heads: int, turn: Rotation, dtype: str
) -> tuple[Heads, Heads, Heads]:
    """One stream of a double block up to the attention."""
    attn = weights["attn"]
    return queries_keys_values(attn["norm"], linear(attn["qkv"], modulate(h, parts[0], parts[1]), dtype), heads, turn)


def single_block(
    weights: Weights,
    h: Tokens,
    parts: Float[Array, "3 hidden 1 b d"],
    heads: int,
    turn: Rotation,
    dtype: str,
    shared: Sequence[Source] = (),
    mask: Array | None = None,
) -> tuple[Tokens, tuple[Heads, Heads]]:
    """A single-stream block: the tokens attend to `shared` and to themselves, those of `mask` if given. Returns them and their own K
    and V."""
    shift, scale, gate = parts
    hidden = h.shape[0]
    first = linear(weights["linear1"], modulate(h, shift, scale), dtype)
    q, k, v = queries_keys_values(weights["norm"], first[: 3 * hidden], heads, turn)
    mixed = attention(q, (*shared, (k, v, mask)), dtype)
    # linear2 on [mixed, gelu] as two products: XLA's CPU loops over a fused concatenation are scalar
    kernel, bias = weights["linear2"]["kernel"], weights["linear2"]["bias"]
    out = linear({"kernel": kernel[:, :hidden], "bias": bias}, mixed, dtype)
    out = out + linear({"kernel": kernel[:, hidden:]}, jax.nn.gelu(first[3 * hidden :]), dtype)
    return h + gate * out, (k, v)


def stream(weights: Weights, name: str) -> Weights:
    """The weights of one stream, "obs" (parameters) or "cond" (data), of a double block."""
    return {part: weights[f"{name}_{part}"] for part in ("attn", "mlp")}


def _rms_norm(x: Heads, scale: Float[Array, " head_dim"]) -> Heads:
    mean_square = _total(piece**2 for piece in _pieces(x, 1)) / x.shape[1]
    return x * jax.lax.rsqrt(mean_square + NORM_EPS)[:, None] * scale[:, None, None, None]


def _few_scores(q: Heads, k: Heads, mask: Array | None, dtype: str) -> Float[Array, "heads queries keys batch draws"]:
    logits = _total(a[:, :, None] * b[:, None] for a, b in zip(_pieces(q, 1), _pieces(k, 1), strict=True))
    return _masked(logits, mask)


def _few_mix(weights: Float[Array, "heads queries keys batch draws"], v: Heads, dtype: str) -> Heads:
    return _total(a[:, None] * b[:, :, None] for a, b in zip(_pieces(weights, 2), _pieces(v, 2), strict=True))


# Keys come last where they are many: softmax and products then run along them, and only tokens are transposed, never logits.


def _many_scores(q: Heads, k: Heads, mask: Array | None, dtype: str) -> Float[Array, "heads batch draws queries keys"]:
    shared = k.shape[-1] == 1 and q.shape[-1] > 1
    product = "hbdie,hbej->hbdij" if shared else "hbdie,hbdej->hbdij"
    keys = jnp.transpose(k[..., 0], (0, 3, 1, 2)) if shared else jnp.transpose(k, (0, 3, 4, 1, 2))
    logits = _einsum(product, jnp.transpose(q, (0, 3, 4, 2, 1)), keys, dtype)
    return _masked(
        logits, None if mask is None else jnp.moveaxis(mask if mask.ndim == 4 else mask[None], (0, 1), (2, 3))
    )


def _many_mix(weights: Float[Array, "heads batch draws queries keys"], v: Heads, dtype: str) -> Heads:
    shared = v.shape[-1] == 1 and weights.shape[2] > 1
    product = "hbdij,hbje->hbdie" if shared else "hbdij,hbdje->hbdie"
    values = jnp.transpose(v[..., 0], (0, 3, 2, 1)) if shared else jnp.transpose(v, (0, 3, 4, 2, 1))
    return jnp.transpose(_einsum(product, weights, values, dtype), (0, 4, 3, 1, 2))


def _einsum(product: str, a: Array, b: Array, dtype: str) -> Array:
    return jnp.einsum(
        product, a.astype(dtype), b.astype(dtype), precision=precision(dtype), preferred_element_type=jnp.float32
    )


def _pieces(x: Array, axis: int) -> list[Array]:
    return [jnp.squeeze(piece, axis) for piece in jnp.split(x, x.shape[axis], axis)]


def _total(parts: Iterable[Array]) -> Array:
    """Sum in order."""
    return functools.reduce(operator.add, parts)
