"""Simulators with known posteriors, for the demo, the tests and the benchmarks. Definitions follow sbibm (Lueckmann et
al. 2101.04653).

>>> from distsbi.tasks import get_task
>>> task = get_task("two_moons")
>>> task.dim_theta, task.dim_x, task.parameter_names
(2, 2, ('theta_0', 'theta_1'))
"""

from collections.abc import Callable
from functools import cache

from distsbi.tasks.base import Task as Task
from distsbi.tasks.gaussian_linear import gaussian_linear
from distsbi.tasks.slcp import slcp
from distsbi.tasks.two_moons import two_moons

# Factories, not tasks: a prior holds arrays, and importing this module must touch no device.
TASKS: dict[str, Callable[[], Task]] = {
    "two_moons": two_moons,
    "gaussian_linear": gaussian_linear,
    "slcp": slcp,
}


@cache
def get_task(name: str) -> Task:
    """The task of that name; the same object at every call.

    Raises ValueError, listing the known names, if there is none.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task named {name!r}; the known tasks are {', '.join(sorted(TASKS))}.")
    return TASKS[name]()
