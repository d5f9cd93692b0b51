"""How long a pool waits: with machines on which workers do not start or only raise, and with workers while the driver itself stood still. No Ray here."""

import time
from collections import Counter
from collections.abc import Callable

FIRST_SECONDS, LONGEST_SECONDS = (
    2.0,
    300.0,
)  # that a machine is left alone: at first, doubled each time up to the longest
MOST_SECONDS = 2.0  # between two ticks of a driver that runs: it waits for at most 1 s at a time


class Backoff:
    """Machines, by name, that are left alone for a while because workers did not start there, or only raised. "" is one that nobody knows."""

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()
        self._until: dict[str, float] = {}

    def failed(self, machine: str, now: float, *, lasting: bool = False) -> float:
        """Notes a worker that did not start there, or only raised. `lasting`: the next will hardly do better. Returns the seconds that it is left alone."""
        self._failures[machine] += 1
        doubled = FIRST_SECONDS * 2.0 ** min(self._failures[machine] - 1, 30)
        seconds = LONGEST_SECONDS if lasting else min(doubled, LONGEST_SECONDS)
        self._until[machine] = now + seconds
        return seconds

    def well(self, machine: str) -> None:
        """Notes a new worker that has done something there: to be up is not enough, if it then only raises."""
        self._failures.pop(machine, None)
        self._until.pop(machine, None)

    def failures(self, machine: str) -> int:
        """In a row."""
        return self._failures[machine]

    def avoided(self, now: float) -> frozenset[str]:
        """The machines that are left alone now."""
        return frozenset(machine for machine, until in self._until.items() if now < until)


class Clock:
    """Seconds that a driver saw pass. One that stood still (a stopped process, a laptop asleep, a slow disk) saw MOST_SECONDS of it: what
    its workers finished meanwhile it does not know yet, so that it cannot tell who is late."""

    def __init__(self, time: Callable[[], float] = time.monotonic) -> None:
        self._time, self._seen = time, time()
        self.now = 0.0

    def tick(self) -> float:
        """Now. To be called at least every MOST_SECONDS."""
        now = self._time()
        self.now += min(now - self._seen, MOST_SECONDS)
        self._seen = now
        return self.now
