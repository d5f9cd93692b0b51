"""Who predicts: networks that encode an observation once and predict at every step."""

from typing import Any

from flax import nnx

from distsbi.networks.base import Context, Network, NetworkParams, encode, takes_missing
from distsbi.networks.embedding import CNN, CNNParams, Embedded, PatchEmbedding, PatchEmbeddingParams
from distsbi.networks.flux1 import Flux1
from distsbi.networks.flux1_joint import Flux1Joint, Flux1JointParams
from distsbi.networks.flux1_params import Flux1Params
from distsbi.networks.joint import Conditional, JointNetwork, Unconditional
from distsbi.networks.mlp import MLP, MLPParams
from distsbi.networks.observation import Layout
from distsbi.networks.simformer import Simformer, SimformerParams

NETWORKS: dict[str, tuple[Any, Any]] = {
    "MLP": (MLPParams, MLP),
    "Flux1": (Flux1Params, Flux1),
    "Flux1Joint": (Flux1JointParams, Flux1Joint),
    "Simformer": (SimformerParams, Simformer),
}


def make_network(name: str, params: dict[str, Any], rngs: nnx.Rngs | None = None) -> Network:
    """The network of that name with these parameters (a dict as in spec.json).

    Raises ValueError naming the known networks, or the unknown parameters.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known are {', '.join(sorted(NETWORKS))}.")
    make_params, make = NETWORKS[name]
    return make(make_params.from_dict(params), rngs=rngs)


def network_name(network: nnx.Module) -> str | None:
    """The name under which `network` can be rebuilt from its parameters, or None for a user's own class."""
    return next((name for name, (_, cls) in NETWORKS.items() if type(network) is cls), None)


__all__ = [
    "CNN",
    "MLP",
    "NETWORKS",
    "CNNParams",
    "Conditional",
    "Context",
    "Embedded",
    "Flux1",
    "Flux1Joint",
    "Flux1JointParams",
    "Flux1Params",
    "JointNetwork",
    "Layout",
    "MLPParams",
    "Network",
    "NetworkParams",
    "PatchEmbedding",
    "PatchEmbeddingParams",
    "Simformer",
    "SimformerParams",
    "Unconditional",
    "encode",
    "make_network",
    "network_name",
    "takes_missing",
]
