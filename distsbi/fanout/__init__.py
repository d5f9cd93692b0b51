"""Work spread over machines with Ray. The only folder that imports ray, and that at first use."""

from distsbi.fanout.catalog import CatalogResult, sample_catalog
from distsbi.fanout.simulation import SimulationResult, simulate
from distsbi.fanout.stopping import Terminated

__all__ = ["CatalogResult", "SimulationResult", "Terminated", "sample_catalog", "simulate"]
