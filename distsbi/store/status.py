"""How far a catalog is, from its folder alone, while it is being written or after.

The journal has a line for each shard with its rows by status, its bytes and why rows are bad. A shard that is there
without such a line (the process was killed between the two) is read itself.
"""

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distsbi.store import layout, schema, writer
from distsbi.store.place import Place
from distsbi.store.reading import decoded
from distsbi.store.schema import FAILED, OK, STATUSES

REASONS = 20  # different reasons kept for each shard
WINDOW = 200  # the rate is that of so many last shards
OTHER = "other reasons"
FAR = "ok, but "  # begins what is said of good rows
NUMBER = re.compile(r"(?<![A-Za-z_\d])[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a catalog is.

    `counts`: rows by status ("ok", "invalid", "failed", "quarantined"); `left`: rows of shards not done; `reasons`: bad rows, and good ones
    far outside the simulations, by message, the most frequent first; `failures`: attempts at shards that failed; `last_failure`: why the last
    of them did; `given_up`: shards that the last call gave up; `searched`: shards in which the row that kills or hangs its worker is being sought; `damaged`: shards that are there but cannot be read, which count
    as not done. `rate`: rows/s of the last call's latest shards, `to_go`:
    seconds at that rate, None where they are not known; `writer`: who is writing now, None: nobody; `age`: seconds since the
    last shard.
    """

    shards: int
    shards_done: int
    rows: int
    left: int
    counts: dict[str, int]
    reasons: dict[str, int]
    failures: int
    last_failure: str | None
    given_up: tuple[int, ...]
    searched: tuple[int, ...]
    damaged: tuple[int, ...]
    rate: float | None
    to_go: float | None
    writer: str | None
    age: float | None

    @property
    def complete(self) -> bool:
        return self.shards_done == self.shards


def read_status(
    out: Place, n_rows: int, rows_per_shard: int, of_shard: Callable[[Place], dict[str, Any]] | None = None
) -> Status:
    """How far a folder is. `of_shard`: rows by status and reasons of a shard that the journal does not know; None: of a catalog's."""
    of_shard = of_shard or read_manifest
    shards = layout.shard_count(n_rows, rows_per_shard)
    sizes = layout.shard_sizes(out, shards)
    journal = layout.read_journal(out)
    known = manifests(journal, sizes)
    counts, reasons = Counter(dict.fromkeys(STATUSES, 0)), Counter()
    damaged = []
    bad = known_bad(journal)
    for shard in sizes:
        if shard in bad:
            damaged.append(shard)
            continue
        try:
            found, file = known.get(shard), layout.shard_file(out, shard, shards)
            found = found or of_all_rows(of_shard(file), layout.shard_rows(shard, n_rows, rows_per_shard), file)
        except (ValueError, OSError):
            damaged.append(shard)
            continue
        counts.update({name: found.get(name, 0) for name in STATUSES})
        reasons.update(found["reasons"])
    last = _last_call(journal)
    given_up = {e["shard"] for e in last if e["event"] == "given_up"} - set(sizes)
    searched = {e["shard"] for e in last if e["event"] == "halved"} - set(sizes) - given_up
    done = [e for e in last if e["event"] == "done"]
    sign = writer.last_sign(out)
    rate, left = _rate(last), n_rows - counts.total()
    failed = [e["error"] for e in journal if e["event"] == "failed"]
    return Status(
        *(shards, len(sizes) - len(damaged), n_rows, left, dict(counts), dict(reasons.most_common())),
        failures=len(failed),
        last_failure=failed[-1] if failed else None,
        given_up=tuple(sorted(given_up)),
        searched=tuple(sorted(searched)),
        damaged=tuple(damaged),
        rate=rate,
        to_go=left / rate if rate and sign and left else None,
        writer=sign[1] if sign else None,
        age=time.time() - done[-1]["time"] if done else None,
    )


def last_lines(journal: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The journal's last word on each shard that was made and not removed."""
    known: dict[int, dict[str, Any]] = {}
    for event in journal:
        if event["event"] in ("done", "found"):
            known[event["shard"]] = event
        elif event["event"] == "removed":
            known.pop(event["shard"], None)
    return known


def known_bad(journal: list[dict[str, Any]]) -> dict[int, str]:
    """Shards that were found bad, with the reason, and are to be removed by the next call that can make them again."""
    known: dict[int, str] = {}
    for event in journal:
        if event["event"] == "bad":
            known[event["shard"]] = event["reason"]
        elif event["event"] in ("good", "done", "found", "removed"):
            known.pop(event["shard"], None)
    return known


def manifests(journal: list[dict[str, Any]], sizes: dict[int, int]) -> dict[int, dict[str, Any]]:
    """The last line of each shard that is there as large as it was written."""
    return {shard: line for shard, line in last_lines(journal).items() if sizes.get(shard) == line.get("bytes")}


def read_manifest(shard: Place) -> dict[str, Any]:
    """Rows by status and reasons of a shard file itself. Raises ValueError naming a file that is damaged, OSError if it cannot be read now."""
    counts = schema.read_counts(shard)
    rows = decoded(shard, lambda file: pq.read_table(file, columns=["status", "message"]))
    return {**counts, "reasons": count_reasons(rows)}


def of_all_rows(manifest: dict[str, Any], rows: range, file: object) -> dict[str, Any]:
    """The manifest that was read from a shard. Raises ValueError if it does not tell of every row."""
    told = sum(manifest.get(name, 0) for name in STATUSES)
    if told != len(rows):
        raise ValueError(
            f"{file}, with its record of failures if it has one, tells of {told} of {len(rows)} rows; remove it and make it again."
        )
    return manifest


def count_reasons(table: pa.Table) -> dict[str, int]:
    """Rows of which there is something to say by message, the most frequent REASONS; the rest under one name. Numbers in what was raised are "#":
    rows that fail alike in other numbers count together. Of good rows, such as those far outside the simulations, it is the first clause."""
    rows = zip(table["status"].to_pylist(), table["message"].to_pylist(), strict=True)
    said = (
        f"{FAR}{message.split(':')[0]}"
        if status == OK
        else f"{status}: {NUMBER.sub('#', message) if status == FAILED else message}"
        for status, message in rows
        if status != OK or message
    )
    return most_frequent(Counter(reason[:200] for reason in said), REASONS)


def most_frequent(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """So many of the reasons, by number of rows; the rest under one name. Where there are more, those that differ in numbers alone are one."""
    named = Counter({reason: count for reason, count in counts.items() if reason != OTHER})
    if len(named) > most:
        alike: Counter[str] = Counter()
        for reason, count in named.items():
            alike[NUMBER.sub("#", reason)] += count
        named = alike
    kept = dict(named.most_common(most))
    rest = sum(counts.values()) - sum(kept.values())
    return {**kept, OTHER: rest} if rest else kept


def _last_call(journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
    begins = [i for i, event in enumerate(journal) if event["event"] == "began"]
    return journal[begins[-1] :] if begins else journal


def _rate(call: list[dict[str, Any]]) -> float | None:
    """Rows/s of the latest shards of a call: those after the first of them, over the time since it."""
    done = [event for event in call if event["event"] == "done"][-WINDOW:]
    if len(done) < 2 or done[-1]["time"] <= done[0]["time"]:
        return None
    return sum(event["rows"] for event in done[1:]) / (done[-1]["time"] - done[0]["time"])
