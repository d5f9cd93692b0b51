"""The loop of a catalog or a simulation: keeps the pool filled, journals what happens, stops when it is told to."""

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from distsbi.fanout.agenda import Agenda, Outcome, Shards
from distsbi.fanout.metrics import Metrics
from distsbi.fanout.pool import Pool
from distsbi.fanout.stopping import Stop, Terminated
from distsbi.files import is_disk_full
from distsbi.store import layout, record, schema, status
from distsbi.store.place import Place
from distsbi.store.writer import Writer

GRACE_SECONDS = 25.0  # for shards at work when SIGTERM comes; Kubernetes and preemption notices give 30

log = logging.getLogger("distsbi")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call did. `counts`: rows by status of the whole folder; `shards_now`: done in this call, with `rows_now` rows, `ok_now` of them good."""

    counts: Counter[str]
    shards_now: int
    rows_now: int
    ok_now: int


ReadManifest = Callable[[Place], dict[str, Any]]  # rows by status, and the reasons of the bad ones, from a shard itself


def work(
    pool: Pool,
    shards: Shards,
    out: Place,
    writer: Writer,
    stop: Stop,
    max_failures: int,
    show_progress: bool,
    metrics: Metrics,
    *,
    what: str = "catalog",
    read_manifest: ReadManifest = status.read_manifest,
) -> Work:
    """Does what is left.

    `what`: the bar's name; `read_manifest`: of a shard that the journal does not know.

    Where the folder does not take a line or a note it is kept and tried again: workers report their own trouble with it.

    Raises RuntimeError at the end if shards were given up (or, as a safeguard, were never done), or if another process took
    the folder over, or may have; OSError if a disk is full, or if the last lines cannot be written; Terminated after SIGTERM.
    """
    with layout.Journal(out) as journal, metrics:
        counts, present = take_stock(out, shards, journal, read_manifest)
        agenda = Agenda(shards, present, max_failures, layout.read_journal(out))
        journal.add({"event": "began", "shards": agenda.left}, now=True)
        shards_now = rows_now = ok_now = 0
        devices, noted = set(), set()
        bar = tqdm(
            total=shards.n_rows,
            initial=counts.total(),
            unit="rows",
            desc=what,
            disable=None if show_progress else True,
        )
        with bar:
            deadline = None
            task = agenda.next()
            while task or pool.busy:
                if stop.told and deadline is None:
                    deadline = time.monotonic() + GRACE_SECONDS
                    pool.hold()
                if deadline is not None and (not pool.busy or time.monotonic() > deadline):
                    raise Terminated
                writer.check()
                while task and pool.room():
                    pool.submit(task)
                    task = agenda.next()
                metrics.in_flight(pool.busy)
                for outcome in pool.wait():
                    if outcome.manifest is None and is_disk_full(outcome.error):
                        raise outcome.error  # type: ignore[misc]
                    for event in agenda.take(outcome):
                        journal.add(event, now=event["event"] not in ("done", "failed"))
                        _say(event, shards)
                    _count(metrics, outcome)
                    if not outcome.manifest:  # failed, or a probe
                        continue
                    counts.update({name: outcome.manifest[name] for name in schema.STATUSES})
                    shards_now, rows_now = shards_now + 1, rows_now + outcome.manifest["rows"]
                    ok_now += outcome.manifest[schema.OK]
                    bar.update(outcome.manifest["rows"])
                    bar.set_postfix(bad=counts.total() - counts[schema.OK])
                    devices.add(outcome.manifest["device"])
                for device in devices - noted:
                    with contextlib.suppress(Exception):  # tried again, and at the end not suppressed
                        record.note_device(out, device)
                        noted.add(device)
                journal.tick()
                task = task or agenda.next()
        for device in devices - noted:
            record.note_device(out, device)
    missing = shards.count - len(present) - shards_now - len(agenda.given_up)
    if missing and deadline is not None:  # SIGTERM came after the last task, and what waited was dropped
        raise Terminated
    if missing:
        raise RuntimeError(
            f"{missing} of {shards.count} shards in {out} are neither done nor given up, a defect of distsbi; report it with "
            f"{layout.HIDDEN}/journal, and give the same call again, which makes them."
        )
    if agenda.given_up:
        shard, reason = next(iter(agenda.given_up.items()))
        rows = shards.rows(shard)
        raise RuntimeError(
            f"{len(agenda.given_up)} of {shards.count} shards failed {max_failures} times each and were given up, e.g. shard "
            f"{shard} (rows {rows.start} to {rows.stop - 1}): {reason}. All others are finished in {out}; the same "
            "call tries these again."
        )
    return Work(counts, shards_now, rows_now, ok_now)


def take_stock(
    out: Place, shards: Shards, journal: layout.Journal, read_manifest: ReadManifest = status.read_manifest
) -> tuple[Counter[str], list[int]]:
    """Rows by status, and the shards that are there and whole.

    A shard that is not as large as it was written, is damaged or was found bad is removed, and so made again. One that the journal does
    not know (a kill came between shard and line) is read, and known from now on.

    Raises OSError if such a one cannot be read now, which is no damage, or if one cannot be removed: it stays.
    """
    sizes = layout.shard_sizes(out, shards.count)
    lines = layout.read_journal(out)
    written = status.last_lines(lines)
    known, bad = status.manifests(lines, sizes), status.known_bad(lines)
    counts, present = Counter(dict.fromkeys(schema.STATUSES, 0)), []
    for shard, size in sizes.items():
        file = layout.shard_file(out, shard, shards.count)
        found = known.get(shard)
        try:
            if shard in bad:
                raise ValueError(bad[shard])
            if found is None and "bytes" in written.get(shard, {}):
                raise ValueError(f"{file} has {size:,} bytes of {written[shard]['bytes']:,}")
            if found is None:
                found = status.of_all_rows(read_manifest(file), shards.rows(shard), file)
                journal.add(
                    {
                        "event": "found",
                        "shard": shard,
                        "rows": len(shards.rows(shard)),
                        **found,
                        "bytes": size,
                    }
                )
        except ValueError as error:
            log.warning("shard %d is made again: %s", shard, error)
            file.remove()  # before its line: a bad one that stays, for it cannot be removed or a kill comes, must stay known as bad
            journal.add({"event": "removed", "shard": shard, "reason": str(error)}, now=True)
            continue
        counts.update({name: found.get(name, 0) for name in schema.STATUSES})
        present.append(shard)
    return counts, present


def _say(event: dict, shards: Shards) -> None:
    """A log line of an event."""
    kind, shard = event["event"], event["shard"]
    where = f"shard {shard}" + (f" rows {event['piece'][0]} to {event['piece'][1] - 1}" if "piece" in event else "")
    if kind == "done":
        log.info(
            "shard %d of %d: %d rows in %.2f s on %s (process %d, %s)",
            *(shard, shards.count, event["rows"], event["seconds"], event["host"], event["pid"], event["device"]),
        )
    elif kind == "failed":
        log.warning("%s failed: %s", where, event["error"])
    elif kind == "halved":
        log.warning("%s: searched in halves for the row that kills or hangs its worker", where)
    elif kind == "quarantined":
        rows = f"rows {event['row']} to {event['stop'] - 1}" if "stop" in event else f"row {event['row']}"
        log.warning("%s (shard %d) is quarantined: %s", rows, shard, event["error"])
    elif kind == "given_up":
        log.error("%s is given up: %s", where, event["error"])


def _count(metrics: Metrics, outcome: Outcome) -> None:
    if outcome.manifest is None:
        if outcome.blamed:
            metrics.failed()
    elif outcome.task.rows is None:
        metrics.done(outcome.manifest["rows"], outcome.manifest[schema.OK])
