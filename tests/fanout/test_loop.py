"""The loop alone: workers that only say they did, so that what may go wrong around them is quick to stage."""

import errno
import io
import json
import types
import uuid
from collections import deque

import pytest

from distsbi.fanout import loop as loops
from distsbi.fanout.agenda import Outcome, Shards
from distsbi.fanout.loop import work
from distsbi.fanout.metrics import Metrics
from distsbi.fanout.stopping import Stop, Terminated, says_how_far
from distsbi.files import is_disk_full
from distsbi.store import layout, record, schema
from distsbi.store.place import Place, as_place

SHARDS = Shards(8, 2, "f")


class FakePool:
    """Takes two tasks at a time, of which one is at work. `become`: what becomes of a task; None: nothing is ever heard of it."""

    def __init__(self, become):
        self._become, self._queue, self._held = become, deque(), False

    @property
    def busy(self):
        return len(self._queue)

    def room(self):
        return self.busy < 2 and not self._held

    def submit(self, task):
        self._queue.append(task)

    def wait(self):
        outcome = self._become(self._queue.popleft())
        return [outcome] if outcome else []

    def hold(self):
        self._held = True
        while self.busy > 1:
            self._queue.pop()


class FakeWriter:
    def check(self):
        pass


def done(task):
    if task.rows is not None:
        return Outcome(task, {})
    good = {**dict.fromkeys(schema.STATUSES, 0), "ok": len(SHARDS.rows(task.shard)) - len(task.skip)}
    who = {"host": "here", "pid": 1, "device": "none", "seconds": 0.0}
    return Outcome(task, {"shard": task.shard, "rows": len(SHARDS.rows(task.shard)), **good, **who})


class Gauge(Metrics):
    """What is said of shards in flight."""

    def __init__(self):
        super().__init__("", 1, ray=False)
        self.said = []

    def in_flight(self, shards):
        self.said.append(shards)


def run(place, become, writer=None, stop=None, metrics=None, pool=None):
    (place / layout.HIDDEN).make_folder()
    pool, writer, stop, metrics = pool or FakePool(become), writer or FakeWriter(), stop or Stop(), metrics or Gauge()
    return work(pool, SHARDS, place, writer, stop, 2, False, metrics)


def test_a_shard_that_is_neither_done_nor_given_up_is_no_success(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 4 shards .* neither done nor given up"):
        run(as_place(tmp_path), lambda task: None if task.shard == 2 else done(task))


def test_a_shard_whose_writing_kills_is_named_at_the_end(tmp_path):
    died = ConnectionError("the process is gone")

    def become(task):
        guilty = task.shard == 1 and (task.rows is None or 3 in range(*task.rows))
        return Outcome(task, error=died, died=True) if guilty else done(task)

    with pytest.raises(RuntimeError, match=r"1 of 4 shards .* shard 1 \(rows 2 to 3\): .* All others are finished"):
        run(as_place(tmp_path), become)
    lines = layout.read_journal(tmp_path)
    assert [line["row"] for line in lines if line["event"] == "quarantined"] == [3]
    assert [line["shard"] for line in lines if line["event"] == "done"] == [0, 2, 3]


def test_nothing_is_in_flight_at_the_end(tmp_path):
    gauge = Gauge()
    run(as_place(tmp_path), done, metrics=gauge)
    assert (max(gauge.said), gauge.said[-1]) == (2, 0)
    gauge = Gauge()
    with pytest.raises(ZeroDivisionError):
        run(as_place(tmp_path / "cut off"), lambda task: 1 / 0, metrics=gauge)
    assert (max(gauge.said), gauge.said[-1]) == (2, 0)


def test_sigterm_lets_what_is_at_work_finish(tmp_path):
    stop = Stop()

    def become(task):
        stop.told = True
        return done(task)

    with pytest.raises(Terminated):
        run(as_place(tmp_path), become, stop=stop)
    assert [line["shard"] for line in layout.read_journal(tmp_path) if line["event"] == "done"] == [0, 1]


def test_sigterm_is_sigterm_when_the_last_shards_are_handed_out(tmp_path):
    """One of them is at work, the other waits behind it and is dropped."""
    stop = Stop()

    class Slow(FakePool):
        def wait(self):
            if [task.shard for task in self._queue] == [2, 3]:
                stop.told = True
                return []
            return super().wait()

    with pytest.raises(Terminated):
        run(as_place(tmp_path), done, stop=stop, pool=Slow(done))
    assert [line["shard"] for line in layout.read_journal(tmp_path) if line["event"] == "done"] == [0, 1, 2]


@pytest.mark.parametrize("error", [Terminated, KeyboardInterrupt])
def test_a_folder_that_does_not_answer_hides_no_interrupt(tmp_path, monkeypatch, error):
    def away(self):
        raise OSError("503: slow down")

    place = as_place(tmp_path)
    (place / layout.HIDDEN).make_folder()
    record.begin(place, {"n_rows": 8, "rows_per_shard": 2}, {})
    with (
        pytest.raises(error, match="^stopped.*, 0 of 4 shards are finished in .*; the same call goes on"),
        says_how_far(place),
    ):
        raise error
    monkeypatch.setattr(Place, "read", away)
    with pytest.raises(error, match="^stopped( by SIGTERM)?; the same call goes on from there"), says_how_far(place):
        raise error


def test_what_takes_longer_than_the_grace_is_left(tmp_path, monkeypatch):
    stop, seconds = Stop(), [0.0]

    class Endless(FakePool):
        def wait(self):
            stop.told = True
            seconds[0] += 1.0
            return []

    monkeypatch.setattr(loops, "time", types.SimpleNamespace(monotonic=lambda: seconds[0]))
    pool = Endless(None)
    with pytest.raises(Terminated):
        run(as_place(tmp_path), None, stop=stop, pool=pool)
    assert pool.busy == 1
    assert loops.GRACE_SECONDS <= seconds[0] < loops.GRACE_SECONDS + 3


@pytest.fixture
def store(monkeypatch):
    """A folder in an object store that takes nothing while `away` is set."""
    pytest.importorskip("fsspec")
    write, place = Place.write, as_place(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(layout, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(layout, "BATCH_SECONDS", 0.0)

    class Store:
        away, refused, error = False, 0, OSError("503: slow down")

    def refuse(self, content):
        if Store.away:
            Store.refused += 1
            raise Store.error
        write(self, content)

    monkeypatch.setattr(Place, "write", refuse)
    Store.place = place
    return Store


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # of pyarrow, and of some of fsspec's
def test_a_store_that_is_away_for_a_while_costs_no_line(store, caplog, error):
    store.error = error("503: slow down")
    caplog.set_level("WARNING", "distsbi")
    record.begin(store.place, {"n_rows": 8, "rows_per_shard": 2}, {"devices": []})

    tried = []

    def become(task):
        tried.append(task.shard)
        store.away = len(tried) < 4
        return Outcome(task, error=ValueError("x")) if tried.count(1) == 1 and task.shard == 1 else done(task)

    made = run(store.place, become)
    assert (made.counts["ok"], made.shards_now, made.rows_now, made.ok_now) == (8, 4, 8, 8)
    assert store.refused > 1
    assert caplog.text.count("cannot be written now, and is kept and tried again: 503: slow down") == 1
    lines = layout.read_journal(store.place)
    assert sorted(line["shard"] for line in lines if line["event"] == "done") == [0, 1, 2, 3]
    assert [line["shard"] for line in lines if line["event"] == "failed"] == [1]
    assert record.read_run(store.place)["about"]["devices"] == ["none"]


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder on a disk that, while `error` is set, does not open the journal, or tears what is written to it, in turn."""
    monkeypatch.setattr(layout, "RETRY_SECONDS", 0.0)

    class Disk:
        place, error, failed = as_place(tmp_path), None, 0

    class File(io.BufferedRandom):
        def write(self, content):
            if Disk.error:
                super().write(content[: len(content) * 2 // 3])
                self.flush()
                raise Disk.error
            return super().write(content)

    def opened(path, mode):
        assert (path, mode) == (layout.journal_file(tmp_path), "ab+")
        Disk.failed += Disk.error is not None
        if Disk.error and Disk.failed % 2:
            raise Disk.error
        return File(io.FileIO(path, "ab+"))

    monkeypatch.setattr(layout, "open", opened, raising=False)
    return Disk


def test_a_disk_that_is_away_for_a_while_costs_no_line(disk, caplog):
    tried = []

    def become(task):
        tried.append(task.shard)
        disk.error = OSError(errno.EIO, "Input/output error") if 1 < len(tried) < 4 else None
        return Outcome(task, error=ValueError("x")) if tried == [0, 1] else done(task)

    made = run(disk.place, become)
    assert (made.shards_now, made.rows_now, made.ok_now) == (4, 8, 8)
    assert disk.failed > 3
    assert caplog.text.count("cannot be written now, and is kept and tried again: [Errno 5]") == 1
    text = layout.journal_file(disk.place).read().decode()
    events = [json.loads(line) for line in text.splitlines()]  # no line is torn, and none is there twice
    assert [event["event"] for event in events if event["event"] != "done"] == ["began", "failed"]
    assert sorted(event["shard"] for event in events if event["event"] == "done") == [0, 1, 2, 3]


def test_a_disk_that_stays_away_is_an_error_at_the_end(disk):
    def become(task):
        disk.error = OSError(errno.ESTALE, "Stale file handle")
        return done(task)

    with pytest.raises(OSError, match="the journal of .* cannot be written .*Stale file handle.; its shards are whole"):
        run(disk.place, become)


def test_a_full_disk_ends_at_once(disk):
    tried = []

    def become(task):
        tried.append(task.shard)
        disk.error = OSError(errno.ENOSPC, "No space left on device")
        return done(task)

    with pytest.raises(OSError, match="No space left on device") as raised:
        run(disk.place, become)
    assert is_disk_full(raised.value)
    assert len(tried) == 1


def test_lines_that_no_one_takes_are_an_error_at_the_end(store):
    def become(task):
        store.away = True
        return done(task)

    with pytest.raises(
        OSError, match="journal of memory://.* cannot be written .503: slow down.; its shards are whole"
    ):
        run(store.place, become)


@pytest.mark.parametrize("error", [RuntimeError("taken over"), KeyboardInterrupt("stopped")])
def test_a_store_that_is_away_does_not_hide_what_ended_the_run(store, error):
    class Lost:
        def check(self):
            if store.away:
                raise error

    def become(task):
        store.away = True
        return done(task)

    with pytest.raises(type(error), match=str(error)):
        run(store.place, become, Lost())
    assert store.refused
