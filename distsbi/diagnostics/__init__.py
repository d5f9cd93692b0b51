"""How good is a posterior: scores against references."""

from distsbi.diagnostics.c2st import c2st as c2st
from distsbi.diagnostics.distance import distance as distance, sliced_wasserstein as sliced_wasserstein
