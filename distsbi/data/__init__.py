"""FROM what a run learns: priors, pairs, standardisation, sources."""

from distsbi.data.bijection import Support
from distsbi.data.pairs import Pairs, open_pairs, read_pairs, simulate_pairs, write_pairs
from distsbi.data.prior import Prior
from distsbi.data.standardise import Standardizer
from distsbi.data.stream import StreamedPairs, iter_pairs

__all__ = [
    "Pairs",
    "Prior",
    "Standardizer",
    "StreamedPairs",
    "Support",
    "iter_pairs",
    "open_pairs",
    "read_pairs",
    "simulate_pairs",
    "write_pairs",
]
