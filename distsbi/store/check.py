"""Whether the shards are what was written: every byte, every row, and no id twice.

Each shard has two checksums: SHA-256 of the file in the journal, and SHA-256 of the decoded contents in its footer. The
first tells any change of the file; the second holds where the journal's line is lost, and after a file was written anew
with the same contents (another compression, say).
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distsbi.files import patiently
from distsbi.store import layout, schema, unique
from distsbi.store.place import Place
from distsbi.store.reading import decoded


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong, in a sentence, and with which shard; None: with several. `unread`: it is not known whether anything is, for the disk or the
    store did not give the file."""

    shard: int | None
    what: str
    unread: bool = False


def check_shards(
    out: Place,
    shards: Iterable[int],
    n_rows: int,
    rows_per_shard: int,
    fingerprint: str,
    journal: dict[int, dict[str, Any]],
) -> Iterator[Problem | pa.Table]:
    """Reads the shards one after another. Yields the table of one that is as it should be, or its problem.

    `journal`: the last "done" line of each shard; what lacks there is checked without.
    """
    count = layout.shard_count(n_rows, rows_per_shard)
    for shard in shards:
        place = layout.shard_file(out, shard, count)
        rows = layout.shard_rows(shard, n_rows, rows_per_shard)
        try:
            yield _read(place, shard, rows, fingerprint, journal.get(shard, {}))
        except OSError as error:
            yield Problem(shard, str(error), unread=True)
        except _Wrong as wrong:
            yield Problem(shard, f"{place.name} {wrong}")


class _Wrong(Exception):
    pass


def _read(place: Place, shard: int, rows: range, fingerprint: str, line: dict[str, Any]) -> pa.Table:
    content = patiently(place.read, place.name)
    if "sha256" in line and hashlib.sha256(content).hexdigest() != line["sha256"]:
        cut = (
            f"it has {len(content):,} bytes of {line['bytes']:,}"
            if len(content) != line["bytes"]
            else "its bytes differ"
        )
        raise _Wrong(f"is not the file that was written: {cut}")
    try:
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            table, footer = file.read(), file.metadata.metadata
        about = schema.read_about(table.schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _Wrong(f"cannot be read ({error})") from error
    if about["fingerprint"] != fingerprint:
        raise _Wrong(f"is of another run ({about['fingerprint']}, not {fingerprint})")
    if table["row"].to_pylist() != list(rows):
        raise _Wrong(f"must hold rows {rows.start} to {rows.stop - 1}; it holds {table.num_rows} rows")
    if schema.DIGEST in footer and footer[schema.DIGEST].decode() != schema.digest(table):
        raise _Wrong("does not hold the numbers that were written (its checksum differs)")
    return table


def check_ids(out: Place, shards: list[int], count: int) -> list[Problem]:
    """Whether an id occurs more than once in shards that can be read."""

    def read_ids(file: Any) -> pa.ChunkedArray:
        return pq.read_table(file, columns=["id"])["id"]

    def ids() -> Iterator[pa.Array]:
        for shard in shards:
            yield from decoded(layout.shard_file(out, shard, count), read_ids).chunks

    rows = sum(len(chunk) for chunk in ids())
    again = unique.repeated(ids, rows)
    some = ", ".join(repr(value) for value, _ in again[:5])
    return [Problem(None, f"{len(again)} ids occur more than once: {some}")] if again else []
