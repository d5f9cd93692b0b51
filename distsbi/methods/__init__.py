"""What is learned: a Gaussian path between noise and data, and what the network predicts along it."""

from typing import Any

import numpy as np

from distsbi.methods.base import Method, Moment
from distsbi.methods.edm import EDM
from distsbi.methods.flow import FlowMatching
from distsbi.methods.score import ScoreMatchingVE, ScoreMatchingVP

FINEST = 96  # steps of the finest grid that calibration solves on

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


def as_method(given: Any) -> Method:
    """A method to learn, or the one of that name; None: flow matching. Raises ValueError for all else, and for one whose finest grids float64 has not."""
    if given is None or isinstance(given, str):
        return make_method("flow" if given is None else given)
    if not isinstance(given, Method):
        made = f" Give {given.__name__}()." if isinstance(given, type) and issubclass(given, Method) else ""
        raise ValueError(
            f"method must be a distsbi.methods.Method or a name, one of {', '.join(sorted(METHODS))}; got {given!r}.{made}"
        )
    if np.any(np.diff(given.grid(FINEST)) <= 0):
        raise ValueError(
            f"{given} puts the times of {FINEST} steps so near the data that some are one number: give it a smaller power."
        )
    return given


__all__ = [
    "EDM",
    "METHODS",
    "FlowMatching",
    "Method",
    "Moment",
    "ScoreMatchingVE",
    "ScoreMatchingVP",
    "as_method",
    "make_method",
]
