"""Amortised posteriors from simulations, trained on a mesh and drawn at scale.

The public names, and nothing else. Each is imported from its module at first use (PEP 562), so that ``import distsbi`` stays quick
and touches no device.

>>> import distsbi
>>> distsbi.__version__
'0.2.0'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distsbi.data import Prior as Prior
    from distsbi.diagnostics import c2st as c2st
    from distsbi.fanout import sample_catalog as sample_catalog, simulate as simulate
    from distsbi.networks import (
        Flux1JointParams as Flux1JointParams,
        Flux1Params as Flux1Params,
        MLPParams as MLPParams,
        SimformerParams as SimformerParams,
    )
    from distsbi.pipelines import (
        ConditionalPipeline as ConditionalPipeline,
        Flux1DiffusionPipeline as Flux1DiffusionPipeline,
        Flux1FlowPipeline as Flux1FlowPipeline,
        Flux1JointDiffusionPipeline as Flux1JointDiffusionPipeline,
        Flux1JointFlowPipeline as Flux1JointFlowPipeline,
        Flux1JointSMPipeline as Flux1JointSMPipeline,
        Flux1SMPipeline as Flux1SMPipeline,
        JointPipeline as JointPipeline,
        MLPDiffusionPipeline as MLPDiffusionPipeline,
        MLPFlowPipeline as MLPFlowPipeline,
        MLPSMPipeline as MLPSMPipeline,
        SimformerDiffusionPipeline as SimformerDiffusionPipeline,
        SimformerFlowPipeline as SimformerFlowPipeline,
        SimformerSMPipeline as SimformerSMPipeline,
        UnconditionalPipeline as UnconditionalPipeline,
        distill as distill,
    )
    from distsbi.processes import initialize as initialize
    from distsbi.sampling import (
        Posterior as Posterior,
        import_gensbi as import_gensbi,
        load as load,
    )
    from distsbi.store import open_catalog as open_catalog
    from distsbi.tasks import get_task as get_task

__version__ = "0.2.0"

_PIPELINES = (
    *("ConditionalPipeline", "JointPipeline", "UnconditionalPipeline"),
    *(
        f"{network}{kind}Pipeline"
        for network in ("Flux1", "Flux1Joint", "MLP", "Simformer")
        for kind in ("Diffusion", "Flow", "SM")
    ),
)
_HOMES = {
    **dict.fromkeys((*_PIPELINES, "distill"), "distsbi.pipelines"),
    **dict.fromkeys(("Flux1JointParams", "Flux1Params", "MLPParams", "SimformerParams"), "distsbi.networks"),
    **dict.fromkeys(("Posterior", "import_gensbi", "load"), "distsbi.sampling"),
    **dict.fromkeys(("sample_catalog", "simulate"), "distsbi.fanout"),
    "open_catalog": "distsbi.store",
    "initialize": "distsbi.processes",
    "Prior": "distsbi.data",
    "get_task": "distsbi.tasks",
    "c2st": "distsbi.diagnostics",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distsbi' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
