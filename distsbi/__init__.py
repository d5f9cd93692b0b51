"""Amortised posteriors from simulations, trained on a mesh and drawn at scale.

The public names, and nothing else. Each is imported from its module at first use (PEP 562), so that ``import distsbi`` stays quick
and touches no device.

>>> import distsbi
>>> distsbi.__version__
'0.1.0'
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distsbi.data import Prior as Prior
    from distsbi.diagnostics import c2st as c2st
    from distsbi.fanout import sample_catalog as sample_catalog
    from distsbi.networks import Flux1Params as Flux1Params, MLPParams as MLPParams
    from distsbi.pipelines import (
        ConditionalPipeline as ConditionalPipeline,
        Flux1FlowPipeline as Flux1FlowPipeline,
        MLPFlowPipeline as MLPFlowPipeline,
    )
    from distsbi.sampling import Posterior as Posterior, load as load
    from distsbi.store import open_catalog as open_catalog
    from distsbi.tasks import get_task as get_task

__version__ = "0.1.0"

_HOMES = {
    "ConditionalPipeline": "distsbi.pipelines",
    "Flux1FlowPipeline": "distsbi.pipelines",
    "MLPFlowPipeline": "distsbi.pipelines",
    "Flux1Params": "distsbi.networks",
    "MLPParams": "distsbi.networks",
    "Posterior": "distsbi.sampling",
    "load": "distsbi.sampling",
    "sample_catalog": "distsbi.fanout",
    "open_catalog": "distsbi.store",
    "Prior": "distsbi.data",
    "get_task": "distsbi.tasks",
    "c2st": "distsbi.diagnostics",
}

__all__ = [
    "ConditionalPipeline",
    "Flux1FlowPipeline",
    "Flux1Params",
    "MLPFlowPipeline",
    "MLPParams",
    "Posterior",
    "Prior",
    "__version__",
    "c2st",
    "get_task",
    "load",
    "open_catalog",
    "sample_catalog",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distsbi' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
