"""FROM what a run learns: priors, pairs, standardisation, sources."""

from distsbi.data.pairs import Pairs, iter_pairs, read_pairs, simulate_pairs, write_pairs
from distsbi.data.prior import Prior
from distsbi.data.standardise import Standardizer, Support

__all__ = ["Pairs", "Prior", "Standardizer", "Support", "iter_pairs", "read_pairs", "simulate_pairs", "write_pairs"]
