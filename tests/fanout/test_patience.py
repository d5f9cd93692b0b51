"""Waiting, without waiting."""

from distsbi.fanout.patience import LONGEST_SECONDS, MOST_SECONDS, Backoff, Clock


def test_a_machine_is_left_alone_for_longer_each_time_and_not_for_ever():
    backoff, now, waits = Backoff(), 100.0, []
    for count in range(1, 60):
        waits.append(backoff.failed("a", now))
        assert backoff.avoided(now + 0.99 * waits[-1]) == {"a"}
        assert backoff.avoided(now + waits[-1]) == frozenset()
        assert backoff.failures("a") == count
        now += waits[-1]
    assert waits[:3] == [waits[0], 2 * waits[0], 4 * waits[0]]
    assert max(waits) == waits[-1] == LONGEST_SECONDS
    assert backoff.failed("b", now) == waits[0]
    backoff.failed("c", now, lasting=True)
    assert backoff.avoided(now + 0.99 * LONGEST_SECONDS) == {"c"}
    backoff.well("a")
    assert backoff.failures("a") == 0
    assert backoff.failed("a", now) == waits[0]


def test_time_in_which_the_driver_stood_still_counts_little():
    ticks = iter([50.0, 50.5, 51.0, 3651.0, 3651.25])
    clock, seen = Clock(lambda: next(ticks)), []
    for _ in range(4):
        clock.tick()
        seen.append(clock.now)
    assert seen == [0.5, 1.0, 1.0 + MOST_SECONDS, 1.25 + MOST_SECONDS]
