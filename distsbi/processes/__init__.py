"""Several processes that train or sample as one: which rank the environment gives this one, how they meet, how they end together."""

from distsbi.processes.given import Rank, find_rank
from distsbi.processes.job import agree_on, count, end, gather, in_step, index, initialize, is_first, join, wait_for_all

__all__ = [
    "Rank",
    "agree_on",
    "count",
    "end",
    "find_rank",
    "gather",
    "in_step",
    "index",
    "initialize",
    "is_first",
    "join",
    "wait_for_all",
]
