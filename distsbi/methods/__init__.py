"""What is learned: a Gaussian path between noise and data, and what the network predicts along it."""

from typing import Any

from distsbi.methods.base import Method, Moment
from distsbi.methods.edm import EDM
from distsbi.methods.flow import FlowMatching
from distsbi.methods.score import ScoreMatchingVE, ScoreMatchingVP

METHODS: dict[str, type[Method]] = {
    "flow": FlowMatching,
    "edm": EDM,
    "vp": ScoreMatchingVP,
    "ve": ScoreMatchingVE,
}


def make_method(name: str, **options: Any) -> Method:
    """The method of that name with its options.

    Raises ValueError naming the known methods, or the options of the one asked for.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(sorted(METHODS))}.")
    return METHODS[name].from_dict(options)


__all__ = ["EDM", "METHODS", "FlowMatching", "Method", "Moment", "ScoreMatchingVE", "ScoreMatchingVP", "make_method"]
