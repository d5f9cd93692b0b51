"""What a misspelt name was meant to be, for error messages.

>>> did_you_mean("stepsize", ["steps", "step_size"])
' Did you mean step_size?'
>>> did_you_mean("colour", ["steps", "step_size"])
''
"""

import dataclasses
import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], *, most: int = 1, by_word: Iterable[str] = ()) -> str:
    """A sentence that names the nearest of `known`, at most so many, and begins with a space; empty where none is near.

    `by_word`: names that any one of their words may stand for ("x" for x_o); they come first.
    """
    near = [candidate for candidate in by_word if name in candidate.split("_")]
    near += difflib.get_close_matches(str(name), list(known), n=most)
    return f" Did you mean {' or '.join(list(dict.fromkeys(near))[:most])}?" if near else ""


def refuse_unknown(what: str, given: Iterable[str], cls: type) -> None:
    """Raises ValueError for a name in `given` that is no field of the dataclass `cls`, naming the nearest and all of them. `what`: "training option"."""
    known = sorted(field.name for field in dataclasses.fields(cls))
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r};{did_you_mean(name, known)} The {what}s are {', '.join(known)}.")
