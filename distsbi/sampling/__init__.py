"""Drawing from a trained posterior."""

from distsbi.sampling.checks import SolveError
from distsbi.sampling.dataset import Dataset
from distsbi.sampling.distill import DistillConfig, train_student
from distsbi.sampling.gensbi import import_gensbi
from distsbi.sampling.joint import JointPosterior
from distsbi.sampling.options import SampleOptions
from distsbi.sampling.posterior import Posterior
from distsbi.sampling.run import load, save
from distsbi.sampling.tiles import Tile

__all__ = [
    "Dataset",
    "DistillConfig",
    "JointPosterior",
    "Posterior",
    "SampleOptions",
    "SolveError",
    "Tile",
    "import_gensbi",
    "load",
    "save",
    "train_student",
]
