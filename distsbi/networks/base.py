"""Who predicts: a network encodes an observation once and is then asked at every solver step.

    context    = network.encode(x)                      once per observation
    prediction = network(t, theta_t, context)           at every step, for many draws that share the context

A network knows nothing of meshes, Ray, files or methods.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

Context = Any
DTYPES = ("float32", "bfloat16")
CONDITIONINGS = ("one_way", "joint")  # of transformers: whether given tokens attend to noised ones


class Network(nnx.Module):
    """The contract. `params` is the frozen dataclass that rebuilds the network (see `NetworkParams`).

    A network of your own on GPUs or TPUs: give its matrix products `precision="highest"`. JAX's default there is TF32 or bfloat16, with which
    draws of another tile shape differ by more than 1e-4 posterior standard deviations.

    `cpu_compiler_options`: XLA's options for training it on CPUs, where a default does not suit it. `exchangeable`: the data are a set, whose order
    must not matter: then entries of x share their scales, and what is said linearly is of their sum.
    """

    cpu_compiler_options: ClassVar[Mapping[str, str]] = {}
    exchangeable: bool = False

    params: Any
    dim_theta: int
    ch_theta: int
    dim_x: int
    ch_x: int

    @abstractmethod
    def encode(self, x: Float[Array, "batch dim_x ch_x"], mask: Bool[Array, "batch dim_x"] | None = None) -> Context:
        """All that depends on the observation alone: a pytree whose leaves have the leading axis batch. `x` is standardised.

        `mask`: which entries are there, for networks with `params.missing`; the others are 0.
        """

    @abstractmethod
    def __call__(
        self, t: Float[Array, "..."], theta_t: Float[Array, "batch draws dim_theta ch_theta"], context: Context
    ) -> Float[Array, "batch draws dim_theta ch_theta"]:
        """The prediction of a(t) y + b(t) z (see `Method.target`; of flow matching y - z), float32, y being the standardised parameters and z noise.

        `theta_t` is the noised y at unit variance, c_in(t) (alpha(t) y + sigma(t) z), and `t` what the method makes of the time (`Method.c_time`):
        the time itself, 0 to 1 from noise to data, but of EDM ln(sigma) / 4. It has shape (), [batch] or [batch, draws]. With a scalar `t`, as in
        sampling, what depends on time alone is computed once and not once per draw.
        """


@dataclasses.dataclass(frozen=True)
class NetworkParams:
    """Plain, JSON-able numbers that rebuild a network."""

    def _name_dtypes(self) -> None:
        """Makes `dtype` and `param_dtype` names. Raises ValueError for what is none."""
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, jnp.dtype(value).name)
            except TypeError:
                raise ValueError(
                    f"{type(self).__name__}.{name} must be {' or '.join(DTYPES)}; got {value!r}."
                ) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields without `rngs`, JSON-able."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The parameters with these fields. Raises ValueError naming the unknown ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"{cls.__name__} has no fields {unknown}; it has {sorted(known)}.")
        return cls(**fields)


def takes_missing(network: Any) -> bool:
    """Whether entries of x may be missing (NaN)."""
    return bool(getattr(getattr(network, "params", None), "missing", False))


def encode(network: Any, standardizer: Any, x: Float[Array, "batch dim_x ch_x"]) -> tuple[Context, Array]:
    """All that is computed once per observation: the network's context, and the standardizer's centre of theta."""
    if not takes_missing(network):
        return network.encode(standardizer.forward_x(x)), standardizer.centre(x)
    there = ~jnp.any(jnp.isnan(x), axis=-1)
    return network.encode(jnp.where(there[..., None], standardizer.forward_x(x), 0.0), there), standardizer.centre(x)


def broadcast_time(t: Float[Array, "..."]) -> Float[Array, "b d"]:
    """`t` of shape (), [batch] or [batch, draws] as [1, 1], [batch, 1] or [batch, draws]."""
    t = jnp.asarray(t, jnp.float32)
    if t.ndim > 2:
        raise ValueError(f"t must have shape (), [batch] or [batch, draws]; got {t.shape}.")
    return t.reshape(t.shape + (1,) * (2 - t.ndim))


def dot(x: Float[Array, "... i"], w: Float[Array, "i o"], dtype: str) -> Float[Array, "... o"]:
    """x @ w with inputs of the compute dtype and float32 accumulation."""
    return jnp.matmul(x.astype(dtype), w.astype(dtype), precision=precision(dtype), preferred_element_type=jnp.float32)


def compute_dtype(network: Any) -> str:
    """The dtype of a network's wide matrix products, also of one that is wrapped (`Embedded`, `Conditional`)."""
    own = getattr(getattr(network, "params", None), "dtype", None)
    return own or (compute_dtype(network.network) if hasattr(network, "network") else "float32")


def precision(dtype: str) -> jax.lax.Precision | None:
    """ "float32" means float32 on every kind of device: GPUs and TPUs would round its inputs to TF32 or bfloat16 by default."""
    return jax.lax.Precision.HIGHEST if dtype == "float32" else None
