"""The search for rows that kill: an oracle instead of workers, so that every case is quick."""

import itertools

import pytest

from distsbi.fanout.agenda import Agenda, MachinesFault, Outcome, Shards, one_line

SHARDS = Shards(60, 20, "f")
DIED = ConnectionError("the process is gone")


def play(agenda, guilty, raises=(), together=(), writing=(), stop_after=10_000):
    """Runs an agenda to its end, or for some outcomes. Returns (rows done, quarantined rows), deaths, events.

    A task dies where one of its rows is `guilty`, all of `together` are among them, or it writes one of the shards `writing`;
    it raises where one row `raises`.
    """
    done, deaths, events = {}, 0, []
    for _ in range(stop_after):
        task = agenda.next()
        if task is None:
            break
        skip = dict(task.skip)
        rows = set(range(*task.rows)) if task.rows else set(agenda.shards.rows(task.shard))
        rows -= set(skip)
        writes = task.rows is None and task.shard in writing
        if rows & set(guilty) or (together and set(together) <= rows) or writes:
            deaths += 1
            events += agenda.take(Outcome(task, error=DIED, died=True))
        elif rows & set(raises):
            events += agenda.take(Outcome(task, error=OSError("the disk is away")))
        else:
            if task.rows is None:
                assert task.shard not in done
                done[task.shard] = (rows, set(skip))
            events += agenda.take(Outcome(task, {"shard": task.shard}))
    else:
        assert stop_after < 10_000, "it goes round in circles"
    return done, deaths, events


@pytest.mark.parametrize("guilty", [[], [0], [59], [7, 8], [3, 17, 25], list(range(20)), [19, 20]])
def test_guilty_rows_alone_are_quarantined(guilty):
    agenda = Agenda(SHARDS, [], 3)
    done, deaths, events = play(agenda, guilty)
    assert set().union(*(rows for rows, _ in done.values())) == set(range(60)) - set(guilty)
    assert set().union(*(skipped for _, skipped in done.values())) == set(guilty)
    assert {e["row"] for e in events if e["event"] == "quarantined"} == set(guilty)
    assert deaths <= len(guilty) * (3 + 3 + 5)
    assert not agenda.given_up


@pytest.mark.parametrize("n", [1, 2])
def test_a_search_goes_on_from_its_journal(n):
    """Wherever the driver dies, the next one finds the same rows and does not begin the search again."""
    whole = play(Agenda(SHARDS, [], n), [7, 33])
    for cut in itertools.count(1):
        done, deaths, events = play(Agenda(SHARDS, [], n), [7, 33], stop_after=cut)
        again, more, _ = play(Agenda(SHARDS, done, n, events), [7, 33])
        assert not set(done) & set(again)
        assert {**done, **again} == whole[0]
        assert deaths + more <= whole[1] + 2 * n  # an attempt that was not decided is made again
        if len(done) == SHARDS.count:
            break


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize("cut", [None, 4, 6])
def test_a_shard_of_one_step_is_probed_before_it_is_blamed(step, cut):
    """One row, or one batch, that kills is quarantined, after probes too; also by a call that goes on."""
    shards = Shards(3 * step - step // 2, step, "f", step)
    done, deaths, events = play(Agenda(shards, [], 2), [step, 2 * step], stop_after=cut or 10_000)
    if cut is not None:
        again, more, new = play(Agenda(shards, done, 2, events), [step, 2 * step])
        done, deaths, events = {**done, **again}, deaths + more, events + new
    assert set(done) == {0, 1, 2}
    assert [set(shards.rows(shard)) == skipped for shard, (_, skipped) in sorted(done.items())] == [False, True, True]
    assert [e["row"] for e in events if e["event"] == "quarantined"] == [step, 2 * step]
    assert deaths == 8 if cut is None else deaths >= 8


@pytest.mark.parametrize("rows, step", [(1, 1), (5, 5), (20, 1), (20, 5)])
def test_a_shard_that_dies_of_its_writing_is_given_up_and_no_row_is_blamed(rows, step):
    agenda = Agenda(Shards(60, rows, "f", step), [], 2)
    done, deaths, events = play(agenda, [], writing=[1])
    assert set(agenda.given_up) == {1} == set(range(agenda.shards.count)) - set(done)
    assert "at no row alone; it may need more memory" in agenda.given_up[1]
    assert (deaths, [e for e in events if e["event"] == "quarantined"]) == (2, [])


@pytest.mark.parametrize("guilty", [[20], [23, 31], range(20, 40)])
@pytest.mark.parametrize("rows, step", [(1, 1), (5, 5), (20, 1), (20, 5)])
@pytest.mark.parametrize("n", [1, 2])
def test_a_shard_that_dies_without_its_guilty_rows_too_is_given_up(guilty, rows, step, n):
    agenda = Agenda(Shards(60, rows, "f", step), [], n)
    bad = {row // rows for row in guilty}
    done, _, events = play(agenda, guilty, writing=bad)
    assert set(agenda.given_up) == bad == set(range(agenda.shards.count)) - set(done)
    assert all("at no row alone of those not in quarantine" in reason for reason in agenda.given_up.values())
    again = Agenda(agenda.shards, done, n, events)  # the next call knows the rows, and has luck with the writing
    assert set(play(again, guilty)[0]) == bad
    assert not again.given_up


def test_rows_that_kill_only_together_are_given_up():
    agenda = Agenda(SHARDS, [], 2)
    done, deaths, events = play(agenda, [], together=[2, 15])
    assert set(done) == {1, 2}
    assert deaths == 2
    assert "at no row alone; it may need more memory" in agenda.given_up[0]
    assert play(Agenda(SHARDS, done, 2, events), [])[0] == {0: (set(range(20)), set())}


def test_what_raises_is_given_up_and_not_searched():
    agenda = Agenda(SHARDS, [], 2)
    done, _, events = play(agenda, [], raises=[25])
    assert set(done) == {0, 2}
    assert [e["event"] for e in events if e.get("shard") == 1] == ["failed", "failed", "given_up"]
    agenda = Agenda(SHARDS, [], 2)  # in a search, too
    done, _, _ = play(agenda, [22], raises=[37])
    assert set(done) == {0, 2}
    assert "the disk is away" in agenda.given_up[1]


def test_rows_are_blamed_for_the_machine_only_at_the_last_attempt_of_a_second_call():
    """Of a shard that was given up, not of one that was done at its second attempt, nor of one that nobody tried yet."""
    tries, events = {0: [], 1: [], 2: []}, []
    for done in ([2], [0]):
        agenda = Agenda(SHARDS, done, 3, events)
        while task := agenda.next():
            tries[task.shard].append(task.blame_rows)
            well = task.shard == 0 and len(tries[0]) == 2
            events += agenda.take(
                Outcome(task, {"shard": 0}) if well else Outcome(task, error=MachinesFault("no memory"))
            )
    assert tries == {0: [False] * 2, 1: [False] * 5 + [True], 2: [False] * 3}


def test_a_worker_that_is_killed_for_want_of_memory_is_no_rows_fault_until_the_end_of_a_second_call():
    no_memory, events = MemoryError("the memory of machine a gave out"), []
    agenda = Agenda(SHARDS, [1, 2], 3, events)
    for _ in range(3):
        events += agenda.take(Outcome(agenda.next(), error=no_memory, died=True))
    assert [event["event"] for event in events] == ["failed"] * 3 + ["given_up"]  # nothing is searched
    assert "the memory of machine a gave out" in agenda.given_up[0]
    agenda = Agenda(SHARDS, [1, 2], 3, events)
    while task := agenda.next():
        rows = set(range(*task.rows or (0, 20))) - set(dict(task.skip))
        needs_more = Outcome(task, error=no_memory, died=True)
        events += agenda.take(needs_more if 7 in rows else Outcome(task, {"shard": 0}))
    assert [event["row"] for event in events if event["event"] == "quarantined"] == [7]
    assert agenda.given_up == {}


@pytest.mark.parametrize("in_flight", [1, 2, 8])
@pytest.mark.parametrize("guilty", [[5], [5, 40], [5, 6, 40], list(range(0, 64, 7))])
def test_rows_that_need_more_memory_than_there_is_are_found_by_the_second_call(guilty, in_flight):
    """However many of them are tried at a time."""
    no_memory, events, shards = MemoryError("the memory of machine a gave out"), [], Shards(64, 64, "f")
    for _ in range(2):
        agenda, tasks = Agenda(shards, [], 3, events), []
        while True:
            while len(tasks) < in_flight and (task := agenda.next()):
                tasks.append(task)
            if not tasks:
                break
            task = tasks.pop(0)
            rows = set(range(*task.rows or (0, 64))) - set(dict(task.skip))
            needs_more = Outcome(task, error=no_memory, died=True)
            events += agenda.take(needs_more if rows & set(guilty) else Outcome(task, {"shard": 0}))
    assert [event["row"] for event in events if event["event"] == "quarantined"] == sorted(guilty)
    assert (events[-1]["event"], agenda.given_up) == ("done", {})


@pytest.mark.parametrize(
    "before",
    [
        [{"event": "given_up", "shard": 0, "error": "the disk is away"}],
        [{"event": "given_up", "shard": 0, "error": "no memory", "machines": True}, {"event": "done", "shard": 0}],
        [{"event": "given_up", "shard": 0, "error": "no memory", "machines": True}, {"event": "removed", "shard": 0}],
    ],
    ids=["of another reason", "done since", "removed since"],
)
def test_rows_are_not_blamed_for_what_ended_in_another_way(before):
    agenda = Agenda(SHARDS, [1, 2], 1, before)
    assert not agenda.next().blame_rows


def test_who_was_not_at_work_is_not_blamed():
    agenda = Agenda(SHARDS, [1, 2], 1)
    task = agenda.next()
    assert agenda.take(Outcome(task, error=DIED, died=True, blamed=False)) == []
    assert agenda.next() == task


def test_quarantine_ends_with_the_shard():
    """A shard that was made and deleted is made as if for the first time."""
    done, _, events = play(Agenda(SHARDS, [], 1), [7])
    assert len(done) == 3
    assert Agenda(SHARDS, [1, 2], 1, events).next().skip == ()


@pytest.mark.parametrize("guilty", [[0], [57], [7, 8], [3, 17, 25], list(range(20))])
@pytest.mark.parametrize("cut", [None, 9])
def test_rows_that_are_done_together_are_searched_and_quarantined_together(guilty, cut):
    """Batches of five, the last of three; also from the journal of a call that was cut off."""
    shards = Shards(58, 20, "f", step=5)
    batches = {row // 5 for row in guilty}
    expected = {row for row in range(58) if row // 5 in batches}
    skipped, events = set(), []
    agendas = [Agenda(shards, [], 2)]
    count = 0
    while task := agendas[-1].next():
        rows = set(range(*(task.rows or (shards.rows(task.shard).start, shards.rows(task.shard).stop))))
        assert min(rows) % 5 == 0
        assert (max(rows) + 1) % 5 == 0 or max(rows) == 57
        alive = rows - {row for row, _ in task.skip}
        if task.rows is None and not alive & expected:
            skipped |= rows - alive
        died = bool(alive & expected)
        outcome = Outcome(task, error=DIED, died=True) if died else Outcome(task, {"shard": task.shard})
        events += agendas[-1].take(outcome)
        count += 1
        if count == cut:
            done = {event["shard"] for event in events if event["event"] == "done"}
            agendas.append(Agenda(shards, done, 2, events))
    assert skipped == expected
    assert not agendas[-1].given_up


def test_what_ray_says_of_a_dead_worker_is_a_sentence():
    error = RuntimeError(
        "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tactor_id: 6a\n\tpid: 12\n\tnamespace: 7\n\tip: 10.0.0.1\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
        "connection error code 2. End of file. There are some potential root causes. (1) The process is killed by SIGKILL"
    )
    other = RuntimeError(
        "A worker died. Worker IP address: 10.0.0.1 Worker port: 3 Worker PID: 12 Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly "
        "exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer"
    )
    says = "its worker (process 12 on 10.0.0.1) died: Worker unexpectedly exits with a connection error code 2. End of file"
    assert one_line(error) == one_line(other) == says
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
