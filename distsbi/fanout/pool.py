"""Who does the tasks: this process, or actors on Ray (ray_pool.py, staff.py). Both take tasks and give outcomes.

A worker is any class with `ready(own_process)`, `begin(plan)` and `do(task, ...)`, such as that of catalogs (worker.py). A task is
anything that can be hashed.
"""

from collections.abc import Hashable
from typing import Any, Protocol, Self

from distsbi.fanout.agenda import Outcome
from distsbi.fanout.stopping import Stop


class Pool(Protocol):
    """Workers. A context manager: at the end all are stopped. `busy`: tasks in flight."""

    @property
    def busy(self) -> int: ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def start(self, stop: Stop) -> dict[str, Any]:
        """What the first worker that is up tells of the run. Raises Terminated if `stop` is told meanwhile."""
        ...

    def begin(self, plan: Any) -> None:
        """What every worker is told before its first task."""
        ...

    def room(self) -> bool:
        """Whether `submit` takes another task now."""
        ...

    def submit(self, task: Hashable, *given: Any) -> None:
        """`given`: what the worker takes beside the task."""
        ...

    def wait(self) -> list[Outcome]:
        """Outcomes since the last call; waits up to about a second for one."""
        ...

    def hold(self) -> None:
        """From now on tasks at work are finished, those that wait are dropped, and there is no room for others."""
        ...


class InProcess:
    """One worker, here. A row that kills or hangs it takes this process along."""

    def __init__(self, worker: Any):
        self._worker = worker
        self._task: tuple[Any, tuple[Any, ...]] | None = None
        self._held = False

    @property
    def busy(self) -> int:
        return int(self._task is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def start(self, stop: Stop) -> dict[str, Any]:
        told = self._worker.ready()
        stop.check()
        return told

    def begin(self, plan: Any) -> None:
        self._worker.begin(plan)

    def room(self) -> bool:
        return self._task is None and not self._held

    def submit(self, task: Hashable, *given: Any) -> None:
        self._task = task, given

    def wait(self) -> list[Outcome]:
        if self._task is None:
            return []
        (task, given), self._task = self._task, None
        try:
            return [Outcome(task, self._worker.do(task, *given))]
        except Exception as error:
            return [Outcome(task, error=error)]

    def hold(self) -> None:
        self._held, self._task = True, None
