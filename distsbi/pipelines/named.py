"""The named pipelines `<Network><Method>Pipeline`: each is a declaration of its network and method, with no logic of its own.

>>> PIPELINES["Flux1Flow"].make_model.__name__, PIPELINES["Flux1Flow"].make_method.__name__
('Flux1', 'FlowMatching')
"""

import dataclasses
import inspect
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from distsbi import mesh as meshes
from distsbi.data.pairs import open_pairs
from distsbi.hints import did_you_mean
from distsbi.methods import EDM, FlowMatching, Method, ScoreMatchingVE, ScoreMatchingVP, as_method
from distsbi.networks import MLP, NETWORKS, JointNetwork, Layout
from distsbi.networks.embedding import default_nets, embedded_shape
from distsbi.networks.observation import Dims
from distsbi.pipelines.base import ConditionalPipeline, key_of_rngs
from distsbi.pipelines.given import nets_by_part
from distsbi.pipelines.joint import JointPipeline
from distsbi.training import TrainingConfig

SDE_TYPES: dict[str, type[Method]] = {"VP": ScoreMatchingVP, "VE": ScoreMatchingVE}
_KINDS = {"Flow": FlowMatching, "Diffusion": EDM, "SM": ScoreMatchingVP}
_SAY = {
    "Flow": "Flow matching", "Diffusion": "EDM diffusion", "SM": 'Score matching (`sde_type`: "VP", the default, or "VE")'
}  # fmt: skip


class NamedPipeline:
    """The constructor of a pipeline that makes its own network and method. `params`: its size; default: `make_params.default(...)`.
    `missing`: NaN in x means that the entry is missing, in training and after; None: where a folder of pairs was simulated or written so."""

    make_params: ClassVar[Any]
    make_model: ClassVar[Any]
    make_method: ClassVar[type[Method]]

    def __init__(
        self,
        train_dataset: Any,
        val_dataset: Any,
        dim_obs: int,
        dim_cond: Dims,
        ch_obs: int = 1,
        ch_cond: int | Mapping[str, int] = 1,
        params: Any = None,
        training_config: dict[str, Any] | TrainingConfig | None = None,
        mesh: meshes.MeshLike = None,
        prior: Any = None,
        sde_type: str | None = None,
        missing: bool | None = None,
        embedding: Any = None,
        **options: Any,
    ):
        layout = Layout.of(dim_cond, ch_cond)
        seed = params.get("rngs") if isinstance(params, dict) else getattr(params, "rngs", None)
        nets = self._nets(layout, embedding, seed)
        if params is None or isinstance(params, dict):
            params = _with_fields(self._default(dim_obs, ch_obs, layout, nets), params or {})
        if missing is None and isinstance(train_dataset, (str, os.PathLike)) and hasattr(params, "missing"):
            missing = open_pairs(train_dataset).missing or None
        if missing is not None and isinstance(params, self.make_params):
            if not hasattr(params, "missing"):
                raise ValueError(
                    f"{type(self).__name__} takes no missing data: say what is there with sample(given={{...}})."
                )
            params = dataclasses.replace(params, missing=missing)
        if not isinstance(params, self.make_params):
            raise ValueError(
                f"params must be {self.make_params.__name__}, or a dict of its fields; got {type(params).__name__}."
            )
        of_joint = ("condition_mask", "condition_mask_kind") if isinstance(self, JointPipeline) else ()
        known = ("augment", "method", *of_joint)
        for name in options:
            if name not in known:
                every = [*inspect.signature(NamedPipeline.__init__).parameters][1:-1] + list(known)
                raise ValueError(
                    f"{type(self).__name__} has no keyword {name!r}.{did_you_mean(name, every)} The keywords are {', '.join(every)}."
                )
        if sde_type is not None and options.get("method") is not None:
            raise ValueError("sde_type and method both say what is learned; give one of them.")
        method = self._method(sde_type) if options.get("method") is None else as_method(options["method"])
        if not isinstance(
            method, tuple(SDE_TYPES.values()) if self.make_method in SDE_TYPES.values() else self.make_method
        ):
            raise ValueError(
                f"{type(self).__name__} learns {self.make_method.__name__}; got method={method!r}. Take the pipeline of that name, one of "
                f"{', '.join(PIPELINES)}, or ConditionalPipeline or JointPipeline with a model of your own."
            )
        rngs = getattr(params, "rngs", None)
        make: Any = super().__init__  # of the pipeline that this is mixed into
        make_model: Any = self.make_model
        make(
            make_model(params, rngs=rngs if rngs is not None else nnx.Rngs(0)),
            train_dataset, val_dataset, dim_obs, dim_cond, ch_obs, ch_cond, training_config,
            mesh=mesh, prior=prior, **{"embedding": nets, **options, "method": method},
        )  # fmt: skip

    @classmethod
    def get_default_training_config(cls) -> dict[str, Any]:
        """The keys of `training_config` and their defaults, a dict to change; None: chosen from the number of simulations."""
        return TrainingConfig().to_dict()

    @classmethod
    def get_default_params(
        cls, dim_obs: int, dim_cond: Dims, ch_obs: int = 1, ch_cond: int | Mapping[str, int] = 1
    ) -> Any:
        """The size of the network that is made where none is given; of images and instruments of that behind the embedding nets."""
        layout = Layout.of(dim_cond, ch_cond)
        return cls._default(dim_obs, ch_obs, layout, cls._nets(layout, None))

    @classmethod
    def _nets(cls, layout: Layout, embedding: Any, rngs: nnx.Rngs | None = None) -> dict[str, Any] | None:
        """The embedding nets, of the user or for images and instruments; None: x goes into the network as it is. `rngs`: those of the network, which
        are not drawn from."""
        nets = nets_by_part(layout, embedding)
        if nets is None and not layout.is_plain and not issubclass(cls.make_model, JointNetwork):
            own = nnx.Rngs(1) if rngs is None else nnx.Rngs(jax.random.fold_in(key_of_rngs(nnx.clone(rngs)), 1))
            return default_nets(layout, "CNN" if cls.make_model is MLP else "PatchEmbedding", own)
        return nets

    @classmethod
    def _default(cls, dim_obs: int, ch_obs: int, layout: Layout, nets: dict[str, Any] | None) -> Any:
        tokens, features = layout.packed if nets is None else embedded_shape(nets, layout)
        return cls.make_params.default(dim_obs, tokens, ch_obs, features)

    def _method(self, sde_type: str | None) -> Method:
        if sde_type is None:
            return self.make_method()
        if self.make_method is not ScoreMatchingVP or str(sde_type).upper() not in SDE_TYPES:
            raise ValueError(
                f'sde_type is "VP" or "VE", for score matching alone; got {sde_type!r} for {self.make_method.__name__}.'
            )
        return SDE_TYPES[sde_type.upper()]()


def _with_fields(default: Any, given: dict[str, Any]) -> Any:
    """`default` with these fields. Raises ValueError naming an unknown one and the nearest known, or one of a wrong type."""
    known = [field.name for field in dataclasses.fields(default)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"{type(default).__name__} has no field {name!r};{did_you_mean(name, known)} The fields are {', '.join(known)}."
            )
    try:
        return dataclasses.replace(default, **given)
    except TypeError as error:
        raise ValueError(f"a field of {type(default).__name__} has a wrong type: {error}; got {given}.") from error


def _named(network: str, kind: str) -> type[Any]:
    make_params, make_model = NETWORKS[network]
    base = JointPipeline if issubclass(make_model, JointNetwork) else ConditionalPipeline
    body = {
        "__doc__": f"{_SAY[kind]} with `{network}`. `params`: `{make_params.__name__}`. Else as `{base.__name__}`.",
        "__module__": __package__,  # where they are imported from, and unpickled
        "make_params": make_params, "make_model": make_model, "make_method": _KINDS[kind],
    }  # fmt: skip
    return type(f"{network}{kind}Pipeline", (NamedPipeline, base), body)


PIPELINES: dict[str, type[Any]] = {f"{network}{kind}": _named(network, kind) for network in NETWORKS for kind in _KINDS}

MLPFlowPipeline, MLPDiffusionPipeline, MLPSMPipeline = (PIPELINES[f"MLP{kind}"] for kind in _KINDS)
Flux1FlowPipeline, Flux1DiffusionPipeline, Flux1SMPipeline = (PIPELINES[f"Flux1{kind}"] for kind in _KINDS)
Flux1JointFlowPipeline, Flux1JointDiffusionPipeline, Flux1JointSMPipeline = (
    PIPELINES[f"Flux1Joint{kind}"] for kind in _KINDS
)
SimformerFlowPipeline, SimformerDiffusionPipeline, SimformerSMPipeline = (
    PIPELINES[f"Simformer{kind}"] for kind in _KINDS
)
