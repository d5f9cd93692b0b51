"""Draws of one observation as a Parquet dataset, by any number of processes, without Ray.

    draws/  part-00000.parquet   draws 0, ..., rows - 1: a float32 column for each parameter
            part-00001.parquet   the next ones; files in the order of their names are the draws in order
            _distsbi.json        what defines the draws, whether all are there, and on what they were drawn
            _distsbi.lock        of the one call that writes here

A draw depends on (seed, observation id, number of the draw) alone, so parts can be drawn anywhere: each process takes a run of the missing ones
and draws them on its own devices, and nothing passes between processes but the list. The files do not depend on how many processes there were. A
part is there if it is complete, holds the bits that were written (checksums of its pages) and says that it is of these draws; the same call again,
by any number of processes, draws what is missing, and removes other parts, which a call that overwrote them and was stopped may have left. A part
that cannot be read now is neither: it is tried again, then the call ends, and the part stays.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Array, Float
from tqdm import tqdm

from distsbi import keys, processes
from distsbi.data import parquet
from distsbi.environment import device_name, versions
from distsbi.files import full_disk_says, one_holder, patiently, write_json, write_whole
from distsbi.sampling import tiles
from distsbi.sampling.checks import SolveError, as_ids, unsolved
from distsbi.sampling.fill import dispatches
from distsbi.sampling.options import ONE, SampleOptions

if TYPE_CHECKING:
    from distsbi.sampling.posterior import Posterior

DEFINITION = "_distsbi.json"
LOCK = "_distsbi.lock"
DIGEST = b"distsbi"  # of the definition, in the metadata of each part
FORMAT = 2  # 2: pages have checksums
PART_ROWS = 2**17  # draws in a part, rounded up to whole blocks
SHARED = "all processes must see the same folder, on a file system that they share"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A written dataset: where it is, how many draws it holds, how many of them were drawn now (by all processes), in how many parts."""

    path: Path
    nsamples: int
    drawn: int
    parts: int

    def read(self) -> Any:
        """All draws in order, as a `pyarrow.Table`. Raises ValueError naming a part that is damaged, OSError for one that cannot be read now."""
        return pa.concat_tables([_read(part_file(self.path, number, self.parts)) for number in range(self.parts)])


def write(
    path: str | os.PathLike[str],
    posterior: "Posterior",
    key: Array,
    x: Float[np.ndarray, "1 dim_x ch_x"],
    nsamples: int,
    *,
    observation_id: int = 0,
    rows_per_part: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Dataset:
    """Writes `nsamples` draws given `x` into the folder `path`, the bits that `posterior.sample` gives; what is there already is kept.

    Args:
        rows_per_part: draws in a file, rounded up to whole blocks of the tile; None: about 131,000.
        overwrite: remove draws of another definition, where there are some.
        options: see `SampleOptions`.

    Raises ValueError if the folder holds other draws (another run, observation, seed, number, solver or tile) and for options that cannot be
    divided, or if another call writes there, `SolveError` at the first draw that is not finite, OSError if the disk is full or a part that is there
    cannot be read now; parts that are complete stay.
    """
    chosen = SampleOptions.parse(options, ("path", *ONE, "rows_per_part", "overwrite"), posterior.no_given)
    if chosen.on_the_way or chosen.check or chosen.coupled:
        raise ValueError(
            "a dataset takes draws that can be divided: leave out return_trajectory, time_grid, check and coupled, or use sample (of check, with "
            "a thousand draws: what it finds is of the solver, not of their number)."
        )
    solver = posterior.solver_for(chosen)
    tile = chosen.make_tile(posterior.tile).for_draws(nsamples, posterior.most_slots)
    if rows_per_part is not None and rows_per_part < 1:
        raise ValueError(f"rows_per_part must be positive; got {rows_per_part}.")
    rows = math.ceil((rows_per_part or PART_ROWS) / tile.draws) * tile.draws
    ids = as_ids([observation_id], len(x))
    definition = {
        "format": FORMAT, "fingerprint": posterior.fingerprint, "x": hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest(),
        "seed": list(keys.key_words(key)), "observation_id": int(ids[0]), "nsamples": nsamples, "rows_per_part": rows,
        "solver": solver.to_dict(), "tile": dataclasses.asdict(tile), "parameter_names": list(posterior.parameter_names),
    }  # fmt: skip
    processes.agree_on(definition, "give all of them the same run and the same command")
    folder = Path(path).absolute()
    parts, digest = _count(definition), _digest(definition)
    kept = "free some space and give the same call again: complete parts are kept"
    with full_disk_says(folder, kept), contextlib.ExitStack() as stack:
        if processes.is_first():
            _differing(folder, definition, overwrite)  # before the lock, which leaves a file
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_holder(folder / LOCK, folder))
            _begin(folder, definition, overwrite)
        processes.wait_for_all()
        if not (folder / DEFINITION).exists():
            raise ValueError(
                f"process {processes.index()} does not see {folder / DEFINITION}, which process 0 wrote: {SHARED}."
            )
        looked_at = range(processes.index(), parts, processes.count())
        missing = sorted(itertools.chain(*processes.gather(_missing(folder, looked_at, parts, digest))))
        mine = _share(missing, processes.index(), processes.count())
        on = processes.gather(_made_on(posterior) if mine else None)
        if processes.is_first():
            _note(folder, definition, [one for one in on if one], complete=not missing)
        wanted = sum(min(rows, nsamples - number * rows) for number in mine)
        with tqdm(total=wanted, unit="draws", unit_scale=True, disable=_hidden(chosen), delay=3) as bar:
            for first, stop in _runs(mine):
                begin, end = first * rows, min(stop * rows, nsamples)
                dispatched = dispatches(
                    posterior, tiles.DRAWS, key, x, ids, end - begin, solver, tile, first_draw=begin
                )
                for number, draws in _cut(dispatched, rows, end, ids):
                    table = pa.table(columns(draws, posterior.parameter_names), metadata={DIGEST: digest})
                    write_whole(
                        part_file(folder, number, parts),
                        lambda file, table=table: pq.write_table(table, file, write_page_checksum=True),
                    )
                    bar.update(len(draws))
        processes.wait_for_all()
        if processes.is_first() and missing:
            _note(folder, definition, [], complete=True)
    drawn = sum(min(rows, nsamples - number * rows) for number in missing)
    return Dataset(folder, nsamples, drawn, parts)


def check(path: str | os.PathLike[str]) -> tuple[bool, Iterator[str | OSError | None]]:
    """(whether all draws are there, for each part what is wrong with it, in a sentence, or the error of one that cannot be read now). The parts
    are read one after another; those that are none of these draws, and would be read with them, come last.

    Raises ValueError if the folder holds no draws, or those of another format.
    """
    folder = Path(path)
    try:
        found = json.loads((folder / DEFINITION).read_text())
        complete, version = found["complete"], found["format"]
        definition = {name: value for name, value in found.items() if name not in ("complete", "made_on")}
        parts = _count(definition)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no draws of distsbi (no {DEFINITION}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / DEFINITION} is damaged; draw into another folder.") from error
    if version != FORMAT:
        raise ValueError(f"the draws in {folder} have format {version}; this distsbi checks format {FORMAT}.")
    names = (part_file(folder, number, parts) for number in range(parts))
    wrong = (_checked(part, _digest(definition)) for part in names if complete or part.exists())
    strays = (f"{part} is none of these draws, but would be read with them." for part in _strays(folder, definition))
    return complete, itertools.chain(wrong, strays)


def _checked(part: Path, digest: bytes) -> str | OSError | None:
    try:
        return _wrong(part, digest)
    except OSError as error:
        return error


def _wrong(part: Path, digest: bytes) -> str | None:
    """What is wrong with a part, in a sentence. Raises OSError if it cannot be read now."""
    if not patiently(part.exists, part):
        return f"{part} is missing."
    try:
        return None if _is_of(_read(part), digest) else f"{part} is of other draws."
    except ValueError as error:
        return f"{part} is damaged ({error.__cause__})."  # the advice is for whoever reads this part alone


def is_part(file: Path) -> bool:
    """Whether a Parquet file says that it is a part of draws; no file that cannot be read does."""
    try:
        return DIGEST in (pq.read_schema(file).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def part_file(folder: Path, number: int, parts: int) -> Path:
    """Of so many parts: names are as wide as the last one's, so that their order is that of the draws.

    >>> part_file(Path(), 7, 100_001).name
    'part-000007.parquet'
    """
    return folder / f"part-{number:0{max(5, len(str(parts - 1)))}d}.parquet"


def columns(draws: Float[np.ndarray, "n dim ch"], names: tuple[str, ...]) -> dict[str, Float[np.ndarray, "n"]]:
    """A column for each parameter, or for each of its channels."""
    if draws.shape[2] == 1:
        return {name: draws[:, i, 0] for i, name in enumerate(names)}
    return {f"{name}[{c}]": draws[:, i, c] for i, name in enumerate(names) for c in range(draws.shape[2])}


def _count(definition: dict[str, Any]) -> int:
    """Of parts."""
    return math.ceil(definition["nsamples"] / definition["rows_per_part"])


def _strays(folder: Path, definition: dict[str, Any]) -> list[Path]:
    """Parts of names that these draws do not have: of more draws, which were overwritten by a call that was stopped before it removed them."""
    parts = _count(definition)
    own = {part_file(folder, number, parts) for number in range(parts)}
    return sorted(part for part in folder.glob("part-*.parquet") if part not in own)


def _digest(definition: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest().encode()


def _differing(folder: Path, definition: dict[str, Any], overwrite: bool) -> list[str] | None:
    """In what the draws in the folder differ, that may be overwritten; None where there are none. Raises ValueError where it holds something
    else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder for the draws.")
    file = folder / DEFINITION
    differing = None
    if file.exists():
        try:
            found = json.loads(file.read_text())
        except ValueError:
            found = {}
        given = json.loads(json.dumps(definition))
        differing = [_told(name, given[name], found.get(name)) for name in given if found.get(name) != given[name]]
        if not differing:
            return []
    elif not folder.exists() or all(other.name == LOCK for other in folder.iterdir()):
        return None
    if differing is None or (differing and not overwrite):
        reason = (
            f"other draws (they differ in {', '.join(differing)})" if differing else "files, but no draws of distsbi"
        )
        raise ValueError(f"{folder} holds {reason}; give another folder{', or overwrite=True' if differing else ''}.")
    return differing


def _told(name: str, given: Any, found: Any) -> str:
    """What differs, with both values where they say something."""
    if name == "seed" and isinstance(found, list):
        given, found = keys.seed_of(given), keys.seed_of(found)
    return f"{name}: given {given}, found {found}" if name in ("seed", "nsamples", "observation_id") else name


def _begin(folder: Path, definition: dict[str, Any], overwrite: bool) -> None:
    """The folder with its definition, and without parts of other names. Of its names some may hold other draws, which are then drawn again."""
    for partial in folder.glob(".part-*"):  # of a process that was killed; nobody writes now
        partial.unlink(missing_ok=True)
    same = _differing(folder, definition, overwrite) == []
    if not same:  # first, so that what is removed is not said to be there
        write_json(folder / DEFINITION, {**definition, "complete": False})
    for other in _strays(folder, definition) if same else folder.glob("part-*.parquet"):
        other.unlink()


def _made_on(posterior: "Posterior") -> dict[str, Any]:
    """Versions and hardware of this process, on which bits depend."""
    return {"device": device_name(next(iter(posterior.mesh.devices.flat))), "versions": versions()}


def _note(folder: Path, definition: dict[str, Any], on: list[dict[str, Any]], *, complete: bool) -> None:
    """Says on what parts are drawn, beside what earlier calls drew them on."""
    made_on = json.loads((folder / DEFINITION).read_text()).get("made_on", [])
    for one in on:
        made_on += [one] if one not in made_on else []
    write_json(folder / DEFINITION, {**definition, "made_on": made_on, "complete": complete})


def _missing(folder: Path, numbers: Iterable[int], parts: int, digest: bytes) -> list[int]:
    """Those of the parts that are to be drawn. Raises OSError if it cannot be told of one that is there, which then stays."""
    return [number for number in numbers if _wrong(part_file(folder, number, parts), digest)]


def _is_of(part: pa.Table, digest: bytes) -> bool:
    """Whether it is of the draws of this definition: an earlier call may have ended between its definition and its parts."""
    return (part.schema.metadata or {}).get(DIGEST) == digest


def _read(part: Path) -> pa.Table:
    """Raises ValueError if it is not what was written, OSError if it cannot be read now."""
    return parquet.read_checked(
        part,
        lambda file: file.read(),
        "{path} is damaged ({error}); give the same call again, which draws it anew.",
        damage=(FileNotFoundError,),
    )


def _share(missing: list[int], index: int, count: int) -> list[int]:
    """The parts of one process: neighbours, so that a dispatch can span them."""
    return missing[index * len(missing) // count : (index + 1) * len(missing) // count]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges.

    >>> list(_runs([0, 1, 2, 5, 7, 8]))
    [(0, 3), (5, 6), (7, 9)]
    """
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], numbers[at - 1] + 1
            start = at


def _cut(
    dispatched: Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]], rows: int, end: int, ids: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of a part, its draws) from blocks in order, which do not cross parts; `end`: the draw after the last."""
    held: list[np.ndarray] = []
    blocks = ((s, slot[: end - s]) for _, start, (made,) in dispatched for s, slot in zip(start, made) if s < end)  # noqa: B905
    for start, draws in blocks:
        if bad := int(unsolved([draws], tiles.DRAWS).sum()):
            raise SolveError({0: bad}, ids, "draws", draws[None])
        held.append(draws)
        if (start + len(draws)) % rows == 0 or start + len(draws) == end:
            yield start // rows, np.concatenate(held)
            held = []


def _hidden(chosen: SampleOptions) -> bool | None:
    if not processes.is_first():
        return True
    return None if chosen.show_progress is None else not chosen.show_progress
