"""What is learned: a Gaussian path between noise and data, and what the network predicts along it."""

from typing import Any

from distsbi.methods.base import Method
from distsbi.methods.flow import FlowMatching

METHODS: dict[str, type[Method]] = {"flow": FlowMatching}


def make_method(name: str, **options: Any) -> Method:
    """The method of that name with its options.

    Raises ValueError naming the known methods, or the options of the one asked for.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known are {', '.join(sorted(METHODS))}.")
    return METHODS[name].from_dict(options)


__all__ = ["METHODS", "FlowMatching", "Method", "make_method"]
