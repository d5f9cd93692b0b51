"""Checks of the arguments that catalogs and simulations share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distsbi.sampling.run import SPEC


def plain(value: Any) -> Any:
    """numpy's numbers as Python's, those in a dict too: they are counted, compared and written as JSON."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def check_whole(name: str, value: Any, least: int = 1, *, optional: bool = False) -> None:
    """Raises ValueError if `value` is no integer of at least `least`, nor None where it is optional."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least else "None, 0 (no Ray) or a positive integer"
        raise ValueError(f"{name} must be {wanted}; got {value!r}.")


def check_resources(workers: Any, cpus: Any, gpus: Any, max_failures: Any, time_limit: Any) -> None:
    """Raises ValueError naming the first that is out of range."""
    check_whole("workers", workers, 0, optional=True)
    check_whole("cpus_per_worker", cpus)
    check_whole("max_failures", max_failures)
    check_gpus(gpus)
    if gpus and workers == 0:
        raise ValueError("num_gpus_per_worker needs workers of their own; give workers >= 1.")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds or None; got {time_limit!r}.")
    if time_limit is not None and workers == 0:
        raise ValueError("time_limit needs workers of their own to kill; give workers >= 1.")


def check_gpus(gpus: Any) -> None:
    """Raises ValueError for a negative share of GPUs."""
    if not gpus >= 0:
        raise ValueError(f"num_gpus_per_worker must not be negative; got {gpus!r}.")


def check_folder(out: Path) -> Path:
    """`out`, a path that exists or may be made. Raises ValueError if it, or what it is to lie in, is a file, or if it is a run directory."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out must be a folder; {there} is a file. Give another path.")
    if (out / SPEC).is_file():
        raise ValueError(f"{out} is a run directory; give another folder.")
    return out
