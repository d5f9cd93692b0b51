"""Whether a folder of pairs, simulated or given, or of draws of one observation holds what was written: every checksum.

Only reads. Nothing is made again to compare, as `distsbi.fanout.verify` does of catalogs.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distsbi.data import parquet
from distsbi.data.pairs import UNFINISHED
from distsbi.fanout import simulation
from distsbi.fanout.simulation_worker import checksums, read_counts
from distsbi.sampling import dataset
from distsbi.sampling.run import SPEC
from distsbi.store import layout, record, status

UNREAD = "what could not be read now is left as it is; verify again when the disk or the store answers"


@dataclasses.dataclass(frozen=True)
class FolderVerdict:
    """What was found: `what` the folder holds ("pairs" or "draws"), files that were read, whether all are there that were asked for, a sentence for
    each problem, and what to do about them."""

    what: str
    files: int
    complete: bool
    problems: tuple[str, ...]
    advice: str

    @property
    def good(self) -> bool:
        return not self.problems


def verify_folder(path: str | os.PathLike[str]) -> FolderVerdict:
    """Reads every file: the checksums of its pages, and of simulations those of whole files too, whether every row is a pair or a recorded failure, and
    whether other files would be read with them. A file that cannot be read now is a problem, but not taken for damaged.

    Raises ValueError for a folder that holds neither pairs nor draws of one observation, such as a catalog, and for shards or parts of draws without what says what they are.
    """
    run = record.read_run(path)
    if run is None:
        record.refuse_bare_shards(path)
    folder = Path(path).absolute()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; give the folder of a catalog, of pairs, or of draws of one observation.")
    if (folder / SPEC).is_file():
        raise ValueError(
            f"{folder} is a run directory, whose weights are checked whenever it is loaded; give the folder of a catalog, of pairs, or of draws of "
            "one observation."
        )
    if (folder / dataset.DEFINITION).exists():
        complete, checked = dataset.check(folder)
        return _verdict(
            "draws",
            complete,
            checked,
            "give the same call again, which draws these parts anew, and removes those that are none of these draws",
        )
    complete = not (folder / UNFINISHED).exists()
    if run is not None and "simulator" in run["definition"]:
        again = simulation.command(run, str(path)) or "the same call of distsbi.simulate"
        checked = _check_simulations(folder, run["definition"], complete)
        return _verdict(
            "pairs",
            complete,
            checked,
            "move files that are no shards of these simulations elsewhere, remove the shards that are damaged or whose records are, and make "
            f"these again with: {again}",
        )
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith((".", "_")))
    if run is not None or not files:
        raise ValueError(f"{folder} holds neither pairs nor draws of one observation; give a folder that does.")
    if any(dataset.is_part(file) for file in files):
        raise ValueError(
            f"{folder} holds parts of draws, but no {dataset.DEFINITION}, which says what they are draws of. Copy that file too, from where "
            "these were copied."
        )
    checked = (_wrong(file) for file in files)
    return _verdict("pairs", complete, checked, "remove the folder, and make the pairs again")


def _verdict(what: str, complete: bool, checked: Iterator[str | OSError | None], advice: str) -> FolderVerdict:
    """`checked`: for each file what is wrong with it, or the error of one that cannot be read now, which is no damage. `advice`: for damage."""
    found = list(checked)
    problems = [said for said in found if said]
    unread = [said for said in problems if isinstance(said, OSError)]
    told = [advice] * (len(unread) < len(problems)) + [UNREAD] * bool(unread)
    return FolderVerdict(what, len(found), complete, tuple(map(str, problems)), "; ".join(told))


def _check_simulations(folder: Path, definition: dict[str, Any], complete: bool) -> Iterator[str | OSError | None]:
    lines = status.last_lines(layout.read_journal(folder))
    count = layout.shard_count(definition["n_rows"], definition["rows_per_shard"])
    for shard in range(count):
        file = layout.shard_file(folder, shard, count)
        if file.exists():
            rows = layout.shard_rows(shard, definition["n_rows"], definition["rows_per_shard"])
            yield _wrong_shard(file, rows, lines.get(shard, {}))
        elif complete:
            yield f"{file} is missing."
    for file in layout.strays(folder, count):
        yield f"{file} is no shard of these simulations, but would be read with them."


def _wrong_shard(file: Path, rows: range, line: dict[str, Any]) -> str | OSError | None:
    """What is wrong with a shard of simulations, or with its record of failures. `line`: of the journal; empty if that was lost."""
    try:
        found = checksums(file)
        for name, of in (("sha256", file), ("failures_sha256", layout.failures_file(file))):
            if name in line and found[name] != line[name]:
                return f"{of} is not the file that was written: its checksum differs."
        status.of_all_rows(read_counts(file), rows, file)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error
    return None


def _wrong(file: Path) -> str | OSError | None:
    """What is wrong with a file of pairs."""
    try:
        parquet.check_file(file)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return error
    return None
