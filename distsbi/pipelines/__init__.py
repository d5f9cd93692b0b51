"""The facade that users of GenSBI know: a pipeline holds data, a network and a method, trains, and samples.

A named pipeline is a declaration of its network and method; everything else is `ConditionalPipeline`. In this package alone,
`obs` means parameters theta and `cond` means data x, as GenSBI has it.
"""

from distsbi.pipelines.base import ConditionalPipeline
from distsbi.pipelines.joint import JointPipeline, UnconditionalPipeline
from distsbi.pipelines.named import (
    PIPELINES,
    Flux1DiffusionPipeline,
    Flux1FlowPipeline,
    Flux1JointDiffusionPipeline,
    Flux1JointFlowPipeline,
    Flux1JointSMPipeline,
    Flux1SMPipeline,
    MLPDiffusionPipeline,
    MLPFlowPipeline,
    MLPSMPipeline,
    SimformerDiffusionPipeline,
    SimformerFlowPipeline,
    SimformerSMPipeline,
)
from distsbi.pipelines.students import distill

__all__ = [
    "PIPELINES",
    "ConditionalPipeline",
    "Flux1DiffusionPipeline",
    "Flux1FlowPipeline",
    "Flux1JointDiffusionPipeline",
    "Flux1JointFlowPipeline",
    "Flux1JointSMPipeline",
    "Flux1SMPipeline",
    "JointPipeline",
    "MLPDiffusionPipeline",
    "MLPFlowPipeline",
    "MLPSMPipeline",
    "SimformerDiffusionPipeline",
    "SimformerFlowPipeline",
    "SimformerSMPipeline",
    "UnconditionalPipeline",
    "distill",
]
