"""Drawing from a trained posterior."""

from distsbi.sampling.options import SampleOptions
from distsbi.sampling.posterior import Posterior
from distsbi.sampling.run import load, save
from distsbi.sampling.tiles import Tile

__all__ = ["Posterior", "SampleOptions", "Tile", "load", "save"]
