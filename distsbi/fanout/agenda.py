"""What is to be done next: shards, and the search for rows that kill or hang their worker. No Ray and no files here.

A shard whose worker died or ran out of time `max_failures` times is searched: its rows are probed (sampled, nothing
written) in two halves, the half that fails is halved again, until the guilty row is alone. A row that fails alone
`max_failures` times is quarantined; then the shard is made without it. A search that finds no row gives the shard up:
what fails then is what only the whole shard does, such as writing it.

    shard fails N times ──► halved ──► probes: cleared, or halved again ──► one row fails N times ──► quarantined ──► shard
                               └────► every probe cleared, or nothing left to probe ──► given up

Every step is an event, a line of the journal; a search that was cut off is taken up again from its events (`replay`).
"""

import dataclasses
import re
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

from distsbi.store import layout

_DIED = re.compile(
    r"Worker exit detail: (.*?)(?= There are some potential root causes| Some common causes include|$)"
)  # of Ray's ActorDiedError


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the rows are divided, and the fingerprint of the run that the shards belong to.

    `step`: rows that are only ever done together; a search does not divide them further, and puts all of them in quarantine.
    `rows_per_shard` is a multiple of it.
    """

    n_rows: int
    rows_per_shard: int
    fingerprint: str
    step: int = 1

    @property
    def count(self) -> int:
        return layout.shard_count(self.n_rows, self.rows_per_shard)

    def rows(self, shard: int) -> range:
        return layout.shard_rows(shard, self.n_rows, self.rows_per_shard)


@dataclasses.dataclass(frozen=True)
class Task:
    """One piece of work.

    Args:
        shard: its number.
        rows: (start, stop), to be sampled without writing anything; None: the whole shard, written.
        skip: rows in quarantine, each with the reason: they are not sampled.
        blame_rows: what could be the machine's fault is taken for the row's, for it gave the shard up in an earlier call, and this is the last
            attempt of this one, or a probe: else a theta that needs more memory than any machine has would keep back its shard for ever. (Of a
            catalog only what kills its worker; what a posterior raises of that kind is the machine's.)
    """

    shard: int
    rows: tuple[int, int] | None = None
    skip: tuple[tuple[int, str], ...] = ()
    blame_rows: bool = dataclasses.field(default=False, compare=False)  # the same task, tried in another way


class MachinesFault(RuntimeError):
    """In place of what a row raised that came of memory, a disk or a device (blame.py)."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a task (a `Task`, where an agenda takes it): a manifest row, or an error.

    `blamed`: it was at work then, not waiting behind another, its machine lives, and its worker is not one that may be sick.
    `died`: it took its worker along (with a MemoryError: for want of memory on the machine) or ran out of time; else it raised.
    """

    task: Any
    manifest: dict[str, Any] | None = None
    error: BaseException | None = None
    blamed: bool = True
    died: bool = False


@dataclasses.dataclass
class _Search:
    """Where the search in one shard stands. `open`: pieces not cleared yet; `found`: rows quarantined by this search."""

    open: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    alone: Counter[int] = dataclasses.field(default_factory=Counter)
    found: set[int] = dataclasses.field(default_factory=set)


class Agenda:
    """Hands out tasks and takes outcomes.

    Args:
        shards: the division of the catalog.
        done: shards that are there.
        max_failures: attempts at a shard, and at a row alone.
        journal: events of earlier calls, oldest first.
    """

    def __init__(self, shards: Shards, done: Iterable[int], max_failures: int, journal: Iterable[dict[str, Any]] = ()):
        self.shards, self.max_failures = shards, max_failures
        self.given_up: dict[int, str] = {}
        self._present = set(done)
        self._failures: Counter[int] = Counter()
        self._quarantine: dict[int, dict[int, str]] = {}
        self._searches: dict[int, _Search] = {}
        self._again: set[int] = set()  # shards that want of memory, a disk or a device gave up in an earlier call
        for event in journal:
            self._apply(event)
            if event["event"] == "given_up" and event.get("machines"):
                self._again.add(event["shard"])
            elif event["event"] in ("done", "found", "removed"):
                self._again.discard(event.get("shard", -1))
        self.given_up.clear()  # each call tries again
        self._todo: deque[Task] = deque()
        for shard in range(shards.count):
            if shard not in self._present:
                self._todo += self._tasks(shard)
        self.left = shards.count - len(self._present)

    def next(self) -> Task | None:
        """A task for the next free worker; None: none now (those in flight may bring more)."""
        while self._todo:
            task = self._todo.popleft()
            if task.shard not in self.given_up:
                last = task.rows is not None or self._failures[task.shard] + 1 >= self.max_failures
                return dataclasses.replace(task, blame_rows=last and task.shard in self._again)
        return None

    def take(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Notes an outcome. Returns its events for the journal, to be written before the next task is handed out."""
        task, shard = outcome.task, outcome.task.shard
        if shard in self.given_up:  # by another probe of it
            return []
        if outcome.manifest is not None:
            events = [{"event": "done", **outcome.manifest} if task.rows is None else self._event("cleared", task)]
        elif not outcome.blamed:
            self._todo.append(task)
            return []
        else:
            events = self._failed(outcome)
        for event in events:
            self._apply(event)
        if events[-1]["event"] in ("halved", "cleared", "quarantined"):
            events += self._go_on(shard, events[-1])
        elif events[-1]["event"] == "failed":
            self._todo.append(task)
        return events

    def _failed(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Events of a failure that counts. A worker that was killed for want of memory is no row's fault, as one that raises MemoryError."""
        task, error = outcome.task, one_line(outcome.error)
        died = outcome.died and (task.blame_rows or not isinstance(outcome.error, MemoryError))
        self._failures[task.shard] += task.rows is None or not died
        search = self._searches.get(task.shard)
        first, stop = task.rows or self._whole(task.shard)
        if task.rows is not None and died and stop - first > self.shards.step:
            return [self._event("failed", task, error=error), self._event("halved", task, piece=[first, stop])]
        if task.rows is not None and died and search is not None:
            search.alone[first] += 1
            attempt = search.alone[first]
        else:
            attempt = self._failures[task.shard]
        events = [self._event("failed", task, attempt=attempt, error=error)]
        if attempt < self.max_failures:
            return events
        if not died:
            machines = isinstance(outcome.error, (MemoryError, MachinesFault))
            return [*events, self._event("given_up", task, error=error, **({"machines": True} if machines else {}))]
        if task.rows is None:  # also of a single row, whose death may have come of what only a whole shard does
            return [*events, self._event("halved", task, piece=[first, stop])]
        more = {"stop": stop} if self.shards.step > 1 else {}
        return [*events, self._event("quarantined", task, row=first, **more, error=error)]

    def _go_on(self, shard: int, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Tasks that follow an event of a search. Returns an event more if the search ended without finding a row."""
        search = self._searches[shard]
        if event["event"] == "halved":
            self._todo += [self._task(shard, half) for half in self._halves(shard, *event["piece"])]
        if search.open:
            return []
        if search.found:
            self._searches.pop(shard)
            self._failures[shard] = 0
            self._todo.append(self._task(shard, None))
            return []
        others = " of those not in quarantine" if self._quarantine.get(shard) else ""
        gone = {
            "event": "given_up",
            "shard": shard,
            "error": f"its worker died or ran out of time at the whole shard, but at no row alone{others}; it may need more "
            "memory or a longer time_limit",
        }
        self._apply(gone)
        return [gone]

    def _apply(self, event: dict[str, Any]) -> None:
        """What an event changes, now or when an earlier call's journal is read."""
        shard, kind = event.get("shard", -1), event["event"]
        if kind in ("done", "found", "removed"):
            self._quarantine.pop(shard, None)
            self._searches.pop(shard, None)
        elif kind == "given_up":
            self._searches.pop(shard, None)
            self.given_up[shard] = event["error"]
        elif kind == "halved":
            self._failures[shard] = 0  # from here on those of the search
            search = self._searches.setdefault(shard, _Search())
            search.open.discard(tuple(event["piece"]))  # type: ignore[arg-type]
            search.open.update(self._halves(shard, *event["piece"]))
        elif kind == "cleared" and shard in self._searches:
            self._searches[shard].open.discard(tuple(event["piece"]))  # type: ignore[arg-type]
        elif kind == "quarantined":
            search = self._searches.setdefault(shard, _Search())
            rows = range(event["row"], event.get("stop", event["row"] + 1))
            search.open.discard((rows.start, rows.stop))
            search.found.update(rows)
            known = self._quarantine.setdefault(shard, {})
            for row in rows:
                known[row] = event["error"]

    def _tasks(self, shard: int) -> list[Task]:
        """The tasks of a shard at the beginning: what an earlier call left of a search, or the shard."""
        search = self._searches.get(shard)
        if search is None or not search.open:
            self._searches.pop(shard, None)
            return [self._task(shard, None)]
        return [self._task(shard, piece) for piece in sorted(search.open)]

    def _task(self, shard: int, rows: tuple[int, int] | None) -> Task:
        return Task(shard, rows, tuple(sorted(self._quarantine.get(shard, {}).items())))

    def _whole(self, shard: int) -> tuple[int, int]:
        rows = self.shards.rows(shard)
        return rows.start, rows.stop

    def _halves(self, shard: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Both halves, without those whose rows are all in quarantine; of a single step, itself."""
        step, known = self.shards.step, self._quarantine.get(shard, {})
        middle = min(-(-((start + stop) // 2) // step) * step, stop)
        halves = [(start, middle), (middle, stop)]
        return [half for half in halves if any(row not in known for row in range(*half))]

    def _event(self, kind: str, task: Task, **more: Any) -> dict[str, Any]:
        piece = {} if task.rows is None else {"piece": list(task.rows)}
        return {"event": kind, "shard": task.shard, **piece, **more}


def one_line(error: BaseException | None) -> str:
    """An error in a sentence: Ray's are pages long, and of a worker that died say how at their end."""
    text = " ".join(str(error).split())
    if died := _DIED.search(text):
        pid, ip = re.search(r"\b(?:Worker PID|pid): (\d+)", text), re.search(r"\b(?:Worker IP address|ip): (\S+)", text)
        process = f"process {pid[1] if pid else '?'} on {ip[1] if ip else '?'}"
        return f"its worker ({process}) died: {died[1].rstrip('. ')}"[:300]
    return f"{type(error).__name__}: {text}"[:300]
