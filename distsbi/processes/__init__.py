"""Several processes that train or sample as one: what place the environment gives this one, how they meet, how they end together."""

from distsbi.processes.given import Place, find_place
from distsbi.processes.job import agree_on, count, end, gather, index, initialize, is_first, join, wait_for_all

__all__ = [
    "Place",
    "agree_on",
    "count",
    "end",
    "find_place",
    "gather",
    "index",
    "initialize",
    "is_first",
    "join",
    "wait_for_all",
]
