"""Sources: batches of any sizes are cut to one, what is held out stays out, and what is read is bounded in bytes."""

import itertools

import numpy as np
import pytest

from distsbi.data import write_pairs
from distsbi.data.source import Shapes, make_source
from distsbi.tasks import get_task

SHAPES = Shapes((2, 1), (2, 1))
ROWS = np.arange(180, dtype=np.float32)
PAIRS = np.stack([ROWS, -ROWS], 1)[..., None], np.stack([ROWS, ROWS + 0.5], 1)[..., None]


def _uneven(sizes=(64, 32, 5, 50, 29)):
    """The 180 pairs in batches of these sizes."""
    ends = np.cumsum(sizes)
    return [tuple(a[end - size : end] for a in PAIRS) for size, end in zip(sizes, ends, strict=True)]


def _rows(stream, count):
    """The row numbers of `count` batches, [count, batch]; theta and x must belong together."""
    batches = list(itertools.islice(stream, count))
    for theta, x in batches:
        np.testing.assert_array_equal(x[:, 1], theta[:, 0] + 0.5)
    return np.stack([theta[:, 0, 0] for theta, _ in batches])


class TestIterable:
    @pytest.mark.parametrize("batch", [7, 32, 64, 200])
    def test_batches_are_joined_and_cut(self, batch):
        """Every row once in every pass, in order, in batches of the size asked for."""
        source = make_source(_uneven(), SHAPES)
        found = _rows(source.batches(0, batch), 20)
        assert found.shape == (20, batch)
        np.testing.assert_array_equal(found.ravel(), np.resize(ROWS, 20 * batch))

    def test_resumes_at_the_same_position_with_rows_held_out(self):
        def source():
            return make_source(_uneven(), SHAPES).hold_out(0.2)

        rest, (held, _) = source()
        assert held[:, 0, 0].tolist() == ROWS[:64].tolist()
        whole = _rows(rest.batches(0, 10), 30)
        np.testing.assert_array_equal(whole.ravel(), np.resize(ROWS[64:], 300))
        for step in (3, 17):
            np.testing.assert_array_equal(_rows(source()[0].batches(step, 10), 30 - step), whole[step:])
            np.testing.assert_array_equal(_rows(rest.batches(step, 10), 30 - step), whole[step:])

    def test_an_iterator_ends_with_its_last_full_batch(self):
        found = _rows(make_source(iter(_uneven()), SHAPES).batches(0, 50), 10)
        np.testing.assert_array_equal(found.ravel(), ROWS[:150])

    @pytest.mark.parametrize("hold_out", [False, True])
    def test_an_empty_second_pass_is_an_error(self, hold_out):
        class Once:
            def __init__(self):
                self.left = _uneven()

            def __iter__(self):
                while self.left:
                    yield self.left.pop(0)

        source = make_source(Once(), SHAPES)
        if hold_out:
            source, _ = source.hold_out(0.2)
        with pytest.raises(ValueError, match="yields nothing when it is iterated again"):
            list(itertools.islice(source.batches(0, 50), 10))


def test_what_is_read_to_fit_and_validate_is_bounded_in_bytes(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs", *PAIRS, rows_per_file=60)
    monkeypatch.setattr("distsbi.data.source.IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("distsbi.data.source.FIT_BYTES", 30 * 4 * 4)  # 30 rows
    for data in (str(tmp_path / "pairs"), _uneven(), get_task("two_moons")):
        source = make_source(data, SHAPES)
        rest, (held, _) = source.hold_out(0.5)
        assert len(rest.fit()[0]) == len(held) == 30
