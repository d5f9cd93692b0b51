"""What errors of bad options say: what a misspelt name was meant to be, and what numbers and counts must be; and where warnings point.

>>> did_you_mean("stepsize", ["steps", "step_size"])
' Did you mean step_size?'
>>> did_you_mean("colour", ["steps", "step_size"])
''
"""

import dataclasses
import difflib
import inspect
import math
import numbers
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = f"{Path(__file__).parent}{os.sep}"


def did_you_mean(name: object, known: Iterable[str], *, most: int = 1, by_word: Iterable[str] = ()) -> str:
    """A sentence that names the nearest of `known`, at most so many, and begins with a space; empty where none is near.

    `by_word`: names that any one of their words may stand for ("x" for x_o); they come first.
    """
    near = [candidate for candidate in by_word if name in candidate.split("_")]
    near += difflib.get_close_matches(str(name), list(known), n=most)
    return f" Did you mean {' or '.join(list(dict.fromkeys(near))[:most])}?" if near else ""


def refuse_unknown(what: str, given: Iterable[str], cls: type, elsewhere: Mapping[str, str] | None = None) -> None:
    """Raises ValueError for a name in `given` that is no field of the dataclass `cls`, naming the nearest and all of them. `what`: "training option".
    `elsewhere`: names of other libraries, with the field that each is here."""
    known = sorted(field.name for field in dataclasses.fields(cls))
    for name in given:
        if name not in known:
            near = did_you_mean((elsewhere or {}).get(name, name), known)
            raise ValueError(f"unknown {what} {name!r};{near} The {what}s are {', '.join(known)}.")


def as_number(what: str, value: Any) -> float:
    """A number of Python's own, so that it is JSON-able: an int stays one, all else is a float; True and False are none. Raises ValueError for all else, naming `what` it is.

    >>> as_number("rtol", "1e-5")
    Traceback (most recent call last):
    ValueError: rtol must be a number; got '1e-5'.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ValueError(f"{what} must be a number; got {value!r}.")
    return value if isinstance(value, int) else float(value)


def as_count(what: str, value: Any, least: int = 1) -> int:
    """A whole number of `least` or more as an int; 32.0, as YAML and JSON give it, is one. Raises ValueError for all else, naming `what` it is.

    >>> as_count("steps", 32.0)
    32
    """
    number: Any = value if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or int(number) != number or number < least:
        says = "a positive integer" if least == 1 else f"a whole number, {least} or more"
        raise ValueError(f"{what} must be {says}; got {value!r}.")
    return int(number)


def warn(message: str) -> None:
    """Warns at the line of the user's that called into this package, however deep it is found."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
