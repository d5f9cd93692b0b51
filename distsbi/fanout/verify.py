"""Whether a catalog is what its run makes: every checksum, and some rows drawn again and compared. What is bad can be made again.

On the kind of hardware and with the versions that made a row (its shard's line of the journal tells both), its draws must be the same bits;
on other hardware they must agree within `TOLERANCE` posterior standard deviations, and the report says so. Other versions may rightly
draw something else: rows that then do not agree are no problem, but cannot be compared.

The standard deviations are those of the row's draws. Of fewer than `FEW` these are no measure, 0 of one draw and tiny by chance of two or three, so that
rounding would pass for an altered draw; pooled over rows they would still be 0 of one draw, and chance again where few rows are drawn. Then they are what
the standardiser learned from the training set of theta given x, near the row's mean, and no less than in the middle: in these units the network computes,
and rounds, and near a bound those of float32 are coarser.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from distsbi.fanout import catalog as catalogs, provenance
from distsbi.fanout.agenda import Shards
from distsbi.fanout.arguments import check_resources
from distsbi.fanout.worker import Worker
from distsbi.store import Catalog, layout, schema, source, status
from distsbi.store.check import Problem, check_ids
from distsbi.store.place import as_place
from distsbi.store.writer import one_writer

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

TOLERANCE = 1e-4  # of a standard deviation, on other hardware
FEW = 30  # draws: the standard deviation of so many is right to 13 %


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found.

    `shards`: checked; `left`: not done yet, and not made by a repair; `rows`: drawn again, `same` of them with the same bits, `close` within
    TOLERANCE, `incomparable` neither, and made with other versions; `farthest`: the largest difference of the others, in standard
    deviations; `elsewhere`: hardware or versions that made rows and are not those here; `problems`: what was wrong; `removed`: shards that a repair removed for it;
    `made`: shards that it made; `reason`: why it did not end well, "" if it did; `command`: what makes those that are left.

    A shard that could not be read now (`Problem.unread`) is neither good nor bad, and is not removed.
    """

    shards: int
    left: int
    rows: int
    same: int
    close: int
    incomparable: int
    farthest: float
    elsewhere: tuple[str, ...]
    problems: tuple[Problem, ...]
    removed: tuple[int, ...]
    made: tuple[int, ...]
    reason: str
    command: str

    @property
    def good(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    @property
    def repaired(self) -> bool:
        """Whether the catalog is complete, everything that was wrong was made again, and that ended well."""
        return not (self.left or self.reason) and all(problem.shard in self.made for problem in self.problems)


def verify(
    out: str | os.PathLike[str],
    *,
    fraction: float = 0.001,
    seed: int | None = None,
    repair: bool = False,
    run: str | None = None,
    catalog: str | None = None,
    network: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    num_gpus_per_worker: float | None = None,
    cpus_per_worker: int | None = None,
    max_failures: int = 3,
    time_limit: float | None = None,
    show_progress: bool = True,
) -> Verdict:
    """Checks an output of `sample_catalog`: reads every shard, and draws some rows again in this process.

    A repair notes in the journal which shards are bad, and goes on with the call that began the folder: once that has found run and catalog to be
    the same, it removes them, and makes them and those that were not done, as any resumed call does. If it cannot (the run or the catalog
    is not where it was, ...), nothing is removed, and the verdict says why; a bad shard that cannot be removed stays known as bad.

    Args:
        out: the output folder, or a URI.
        fraction: of the rows, drawn at random, at least one; 0: none, and neither run nor catalog is needed.
        seed: of the choice; None: another one every time.
        repair: make the shards that are bad, and those not done yet, again; no other call may be writing then.
        run, catalog: where they are now, if they were moved since.
        network: as for `sample_catalog`.
        workers, address, num_gpus_per_worker, cpus_per_worker, max_failures, time_limit: of a repair, as for `sample_catalog`; what each worker
            gets (GPUs, CPUs, time_limit) is, where it is None, what it got when the catalog was drawn. This process keeps the accelerator
            that it drew rows on: on a machine with a single one, give workers=0.
        show_progress: a progress bar, on a terminal.

    Raises ValueError for a folder that is none, a run or catalog that is not there or is another one now, and a fraction outside 0 to 1;
    OSError if the disk or the store does not answer.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1; got {fraction!r}.")
    each = {
        "cpus_per_worker": cpus_per_worker,
        "num_gpus_per_worker": num_gpus_per_worker,
        "time_limit": time_limit,
    }
    each = {name: value for name, value in each.items() if value is not None}
    check_resources(
        workers, each.get("cpus_per_worker", 1), each.get("num_gpus_per_worker", 0), max_failures, time_limit
    )
    opened, place = Catalog(out), as_place(out)
    if workers != 0:
        each = {**provenance.each_worker(opened.run), **each}
    with contextlib.ExitStack() as stack:
        if repair:
            stack.enter_context(one_writer(place))
        again = None
        if fraction and opened.shards:
            again = _again(opened, run=run, catalog=catalog, network=network)
        rng = np.random.default_rng(seed)
        one = opened.shards[rng.integers(len(opened.shards))] if opened.shards else None
        problems, good = [], []
        for shard, found in zip(
            tqdm(opened.shards, unit="shards", desc="verify", disable=None if show_progress else True),
            opened.checked_shards(),
            strict=True,
        ):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            good.append(shard)
            chosen = np.flatnonzero(rng.random(found.num_rows) < fraction)
            if shard == one and not len(chosen):
                chosen = rng.integers(found.num_rows, size=1)
            if again is not None and len(chosen):
                problems += again.compare(shard, found.take(pa.array(chosen)))
        problems += check_ids(place, good, opened.n_shards)
        bad = _note_bad(opened, problems) if repair else set()
    left = missing = {*range(opened.n_shards)} - {*opened.shards} | bad
    reason, removed = "", set()
    if repair and missing:
        try:
            catalogs.sample_catalog(
                **provenance.call(opened.run, out, run=run, catalog=catalog, network=network),
                workers=workers,
                address=address,
                max_failures=max_failures,
                show_progress=show_progress,
                **each,
            )
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error)
        there = set(layout.shards_done(place, opened.n_shards))
        still_bad = status.known_bad(layout.read_journal(place)).keys() & bad & there
        left = missing - there | still_bad
        removed = bad - still_bad
    return Verdict(
        shards=len(opened.shards),
        left=len(left),
        rows=again.rows if again else 0,
        same=again.same if again else 0,
        close=again.close if again else 0,
        incomparable=again.incomparable if again else 0,
        farthest=again.farthest if again else 0.0,
        elsewhere=tuple(again.elsewhere) if again else (),
        problems=tuple(problems),
        removed=tuple(sorted(removed)),
        made=tuple(sorted(missing - left)),
        reason=reason,
        command=provenance.command(opened.run, place.url),
    )


def _again(opened: Catalog, **instead: str | None) -> "_Again":
    """`instead`: `run`, `catalog` or `network`, where they are now. Raises ValueError saying what to give, if one is not there or another one."""
    try:
        return _Again(opened, provenance.job_of(opened.run, opened.place, catalogs.LOADER, **instead))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"rows of {opened.path} cannot be drawn again: {str(error).splitlines()[0].rstrip('.')}. If run or catalog were moved, say where they "
            "are now (run, catalog); with a fraction of 0 the checksums alone are compared."
        ) from error


class _Again:
    """Draws rows again."""

    def __init__(self, catalog: Catalog, job: Any):
        definition = catalog.run["definition"]
        if source.fingerprint(job.source) != definition["catalog"]["content"]:
            raise ValueError(
                f"{as_place(job.source.path)} is not the catalog that was sampled: it has changed since; give the one that was."
            )
        self._worker = Worker(job)
        told = self._worker.ready()
        for name in ("posterior", "seed", "solver"):
            if told["definition"][name] != definition[name]:
                raise ValueError(f"{job.run} is not the run that was sampled: another {name}; give the one that was.")
        self._worker.begin(Shards(catalog.n_rows, catalog.rows_per_shard, catalog.fingerprint))
        self._few = definition["nsamples"] < FEW
        self._same_tile = told["definition"]["tile"] == definition["tile"]
        self._lines = status.last_lines(layout.read_journal(catalog.place))
        self.rows = self.same = self.close = self.incomparable = 0
        self.farthest = 0.0
        self.elsewhere: Counter[str] = Counter()

    def compare(self, shard: int, stored: pa.Table) -> list[Problem]:
        """What is wrong with some rows of a shard."""
        known = [state.as_py() != schema.QUARANTINED for state in stored["status"]]
        stored = stored.filter(pa.array(known))  # those would kill or hang this process
        if not stored.num_rows:
            return []
        made = self._worker.sample(stored["row"].to_pylist(), {})
        self.rows += made.num_rows
        names = ["id", "row", "observation_id", "status"]
        elsewhere, same_versions = self._elsewhere(shard)
        if made.select(names) != stored.select(names):
            if not same_versions:
                self.incomparable += made.num_rows
                self.elsewhere[elsewhere] += made.num_rows
                return []
            return [
                Problem(shard, f"shard {shard} has other ids or statuses than its rows get when they are drawn again")
            ]
        numbers = [name for name in stored.column_names if name not in (*names, "message")]
        good = stored["row"].filter(pc.equal(stored["status"], schema.OK)).to_pylist()
        self.same += made.num_rows - len(good)  # rows without draws, whose status agrees
        if not good:
            return []
        pairs = [(_numbers(stored[name]), _numbers(made[name])) for name in numbers]
        exact = np.all([(there.view(np.uint32) == here.view(np.uint32)).all(1) for there, here in pairs], axis=0)
        sd = self._spread(_numbers(stored["mean"])) if self._few else _numbers(stored["sd"])
        distance = np.max([_distance(there, here, sd) for there, here in pairs], axis=0)
        close = distance <= TOLERANCE
        self.same += int(exact.sum())
        self.close += int((close & ~exact).sum())
        if not exact.all() and elsewhere:
            self.elsewhere[elsewhere] += int((~exact).sum())
        if not same_versions:
            self.incomparable += int((~close).sum())
            self.farthest = max(self.farthest, float(distance[close].max(initial=0.0)))
            return []
        self.farthest = max(self.farthest, float(distance.max()))
        wrong = np.flatnonzero(~close if elsewhere else ~exact)
        if not len(wrong):
            return []
        what = (
            f"shard {shard} holds other draws than its run makes, e.g. row {good[wrong[0]]}: {distance[wrong].max():.3g} standard "
            "deviations apart"
        )
        return [Problem(shard, what if elsewhere else f"{what} on the same kind of hardware")]

    def _spread(self, mean: np.ndarray) -> np.ndarray:
        """About the standard deviation of each row's posterior, whatever its draws. Both [rows, size]."""
        scales, nothing = self._worker.posterior.scales, np.zeros_like(self._worker.posterior.scales.theta_mean)
        middle = scales.spread(scales.inverse(nothing, nothing))
        near = scales.spread(mean.reshape(-1, *nothing.shape))
        return np.asarray(np.maximum(near, middle)).reshape(mean.shape)

    def _elsewhere(self, shard: int) -> tuple[str, bool]:
        """What differs between where a shard was made and here ("" if nothing that bits depend on does), and whether the versions are the
        same."""
        line, here = self._lines.get(shard, {}), self._worker.versions
        there = line.get("versions")
        if there is None:  # of a version that did not keep them, or a kill came between the shard and its line
            other = ["versions that the journal does not tell"]
        else:
            other = [f"{name} {there[name]}" for name in here if there[name] != here[name]]
        same_versions = not other
        device = line.get("device", "hardware that the journal does not tell")
        if device != self._worker.device:
            other.insert(0, device)
        if not self._same_tile:
            other.append("another tile")
        return ", ".join(other), same_versions


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a fixed-size column, [rows that have some, size] float32."""
    array = column.combine_chunks()
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    return np.ascontiguousarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(-1, array.type.list_size)


def _distance(there: np.ndarray, here: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """The largest difference of each row, in standard deviations; inf where one is 0 and they differ.

    `there`, `here`: [rows, numbers], `sd`: [rows, size], which divides them.
    """
    difference = np.abs(there.astype(np.float64) - here).reshape(len(sd), -1, sd.shape[1])
    spread = np.broadcast_to(sd[:, None, :], difference.shape)
    scaled = np.where(difference > 0, np.inf, 0.0)
    np.divide(difference, spread, out=scaled, where=spread > 0)
    return scaled.max((1, 2))


def _note_bad(catalog: Catalog, problems: list[Problem]) -> set[int]:
    """Journals which shards are bad, and which are so no more (somebody put them right). Returns the bad ones."""
    bad = {
        problem.shard: problem.what
        for problem in reversed(problems)
        if problem.shard is not None and not problem.unread
    }
    unknown = {problem.shard for problem in problems if problem.unread}
    before = status.known_bad(layout.read_journal(catalog.place))
    with layout.Journal(catalog.place) as journal:
        for shard, what in sorted(bad.items()):
            journal.add({"event": "bad", "shard": shard, "reason": what}, now=True)
        for shard in sorted(before.keys() - bad.keys() - unknown):
            journal.add({"event": "good", "shard": shard}, now=True)
    return set(bad)
