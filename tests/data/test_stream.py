"""Streaming: every row once, an order by (seed, epoch), the same batches from any position on, bounded memory, a thread that ends."""

import itertools
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi.data import StreamedPairs, iter_pairs, open_pairs, stream, write_pairs
from distsbi.data.parquet import read_file, row_groups
from distsbi.data.source import Shapes, make_source
from distsbi.data.stream import Groups, ahead, endless

N = 103
THETA = np.stack([np.arange(N), -np.arange(N)], 1).astype(np.float32)
X = np.random.default_rng(0).normal(size=(N, 3, 2)).astype(np.float32)
ROW_BYTES = 4 * (2 + 6)
SHAPES = Shapes((2, 1), (3, 2))


@pytest.fixture
def folder(tmp_path):
    """Files of 20 rows, the first of which has row groups of seven."""
    path = tmp_path / "pairs"
    write_pairs(path, THETA, X, names=["a", "b"], rows_per_file=20)
    pq.write_table(pq.read_table(path / "pairs-00000.parquet"), path / "pairs-00000.parquet", row_group_size=7)
    return path


def rows_of(batches):
    """The row numbers of batches, each an array; theta and x must belong together."""
    found = []
    for theta, x in batches:
        rows = theta[:, 0, 0].astype(int)
        np.testing.assert_array_equal(x, X[rows])
        found.append(rows)
    return found


def epoch(folder, **options):
    return rows_of(iter_pairs(folder, 8, seed=1, **options))


def windows_of(groups: int) -> int:
    """Buffer for windows of about so many rows."""
    return 3 * groups * ROW_BYTES


def test_row_groups_are_read_alone(folder):
    file = folder / "pairs-00000.parquet"
    assert row_groups(file) == (7, 7, 6)
    np.testing.assert_array_equal(read_file(file, (2, 1), (3, 2), group=1)[1], X[7:14])
    assert len(Groups.of(open_pairs(folder)).groups) == 8


class TestOrder:
    @pytest.mark.parametrize("rows", [1, 25, 1000])
    def test_an_epoch_is_a_permutation_short_of_one_batch(self, folder, rows):
        batches = epoch(folder, buffer_bytes=windows_of(rows))
        assert [len(b) for b in batches] == [8] * (N // 8)
        assert len(np.unique(np.concatenate(batches))) == N // 8 * 8

    def test_what_is_left_out_changes(self, folder):
        left = [set(range(N)) - set(np.concatenate(epoch(folder, epoch=e)).tolist()) for e in range(5)]
        assert len(set.union(*left)) > 7

    def test_order_depends_on_seed_and_epoch_alone(self, folder):
        first = np.concatenate(epoch(folder))
        np.testing.assert_array_equal(first, np.concatenate(epoch(folder)))
        assert not np.array_equal(first, np.concatenate(epoch(folder, epoch=1)))
        assert not np.array_equal(first, np.concatenate(rows_of(iter_pairs(folder, 8, seed=2))))

    def test_rows_mix_within_a_window(self, folder):
        first = epoch(folder)[0]
        assert len({row // 20 for row in first}) >= 3
        assert len({row // 20 for row in epoch(folder, buffer_bytes=1)[0]}) <= 2


class TestPosition:
    @pytest.mark.parametrize("rows", [1, 25, 50, 1000])
    def test_resumes_at_any_batch(self, folder, rows):
        size = windows_of(rows)
        whole = epoch(folder, buffer_bytes=size)
        for batch in range(len(whole) + 1):
            rest = epoch(folder, batch=batch, buffer_bytes=size)
            np.testing.assert_array_equal(np.array(rest), np.array(whole[batch:]))

    def test_epochs_follow_each_other(self, folder):
        groups, options = Groups.of(open_pairs(folder)), {"seed": 1, "buffer_bytes": windows_of(25)}
        whole = list(itertools.islice(rows_of(itertools.islice(endless(groups, 8, **options), 40)), 40))
        each = [epoch(folder, epoch=e, buffer_bytes=windows_of(25)) for e in range(4)]
        np.testing.assert_array_equal(whole, list(itertools.chain(*each))[:40])
        for step in (5, 12, 29):
            rest = rows_of(itertools.islice(endless(groups, 8, step=step, **options), 40 - step))
            np.testing.assert_array_equal(rest, whole[step:])

    def test_only_the_window_of_the_position_is_read(self, folder, monkeypatch):
        read, found = [], Groups.read
        monkeypatch.setattr(
            Groups, "read", lambda self, group, missing: read.append(group) or found(self, group, missing)
        )
        next(iter_pairs(folder, 8, seed=1, batch=11, buffer_bytes=1))
        assert len(read) <= 4

    def test_processes_share_every_batch(self, folder):
        whole = epoch(folder, buffer_bytes=windows_of(25))
        parts = [epoch(folder, buffer_bytes=windows_of(25), part=(i, 4)) for i in range(4)]
        assert {len(rows) for part in parts for rows in part} == {2}
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_errors_come_at_the_call(folder):
    for options, message in (
        ({"batch_size": 104}, "batch_size=104 is more than the 103 pairs"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 8, "part": (0, 3)}, "batch_size=8 cannot be divided into 3 parts"),
        ({"batch_size": 8, "part": (2, 2)}, "of which this is number 2"),
    ):
        with pytest.raises(ValueError, match=message):
            iter_pairs(folder, seed=0, **options)
    with pytest.raises(ValueError, match="buffer_bytes must be positive; got 0"):
        StreamedPairs(folder, buffer_bytes=0)


def test_nan_is_named_with_its_file(folder):
    table = pq.read_table(folder / "pairs-00002.parquet")
    x = X[40:60].copy()
    x[3] = np.nan
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(x)
    pq.write_table(table.set_column(1, "x", column), folder / "pairs-00002.parquet")
    with pytest.raises(ValueError, match=r"pairs-00002.parquet, row group 0: x has NaN or inf"):
        epoch(folder)


class TestAhead:
    def test_the_same_items_and_errors(self):
        assert list(ahead(iter(range(50)))) == list(range(50))

        def fails():
            yield 1
            raise OSError("the disk is away")

        found = ahead(fails())
        assert next(found) == 1
        with pytest.raises(OSError, match="the disk is away"):
            next(found)
        assert not self.threads()

    def test_no_more_than_asked_for_is_made_and_the_thread_ends(self):
        made, enough = [], threading.Event()

        def count():
            for i in itertools.count():
                made.append(i)
                if i == 2:
                    enough.set()
                yield i

        found = ahead(count())
        next(found)
        assert enough.wait(60)  # one is read, one waits, one is made
        found.close()
        assert made == [0, 1, 2]
        assert not self.threads()

    def test_a_stream_that_is_dropped_leaves_no_thread(self, folder):
        source = make_source(StreamedPairs(folder, buffer_bytes=1), SHAPES)
        batches = source.batches(0, 8)
        next(batches)
        assert self.threads()
        del batches
        assert not self.threads()

    @staticmethod
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "distsbi-ahead"]


def test_memory_is_bounded(tmp_path):
    """20 MB of pairs in row groups of 80 kB, through a buffer of 1.2 MB."""
    theta = np.random.default_rng(0).normal(size=(50_000, 2)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(50_000, 98)).astype(np.float32)
    write_pairs(tmp_path / "pairs", theta, x, rows_per_file=10_000)
    for file in (tmp_path / "pairs").glob("*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=200)
    del theta, x
    source = make_source(StreamedPairs(tmp_path / "pairs", buffer_bytes=1_200_000), Shapes((2, 1), (98, 1)))
    rest, (held, _) = source.hold_out(0.02)
    tracemalloc.start()
    rows = sum(len(theta) for theta, _ in itertools.islice(rest.batches(0, 100), 490))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 49_000
    assert len(held) == 1_000
    assert peak < 3_000_000


class TestSource:
    def test_held_out_rows_are_never_trained_on(self, folder):
        rest, (held, _) = make_source(StreamedPairs(folder, seed=3), SHAPES).hold_out(0.3)
        out = set(held[:, 0, 0].astype(int).tolist())
        seen = set(np.concatenate(rows_of(itertools.islice(rest.batches(0, 8), 40))).tolist())
        assert seen | out == set(range(N))
        assert not seen & out
        assert rest.size == N - len(out)
        assert rest.fingerprint != make_source(StreamedPairs(folder, seed=4), SHAPES).hold_out(0.3)[0].fingerprint

    def test_scales_are_fitted_on_rows_of_the_whole_folder(self, folder, monkeypatch):
        """However the folder is sorted."""
        theta, x = make_source(StreamedPairs(folder), SHAPES).fit()
        np.testing.assert_array_equal(theta[..., 0], THETA)
        monkeypatch.setattr("distsbi.data.source.FIT_PAIRS", 20)
        monkeypatch.setattr(stream, "SAMPLED_GROUPS", 6)
        theta, x = make_source(StreamedPairs(folder), SHAPES).fit()
        rows = rows_of([(theta, x)])[0]
        assert len(np.unique(rows)) == 20
        assert rows.min() < 10
        assert rows.max() > 93

    def test_one_row_group_cannot_be_held_out_of(self, tmp_path):
        write_pairs(tmp_path / "one", THETA, X)
        with pytest.raises(ValueError, match="pairs-00000.parquet is one row group, .*: give val_dataset"):
            make_source(StreamedPairs(tmp_path / "one"), SHAPES).hold_out(0.1)

    def test_large_folders_are_streamed_by_themselves(self, folder, monkeypatch):
        assert make_source(folder, SHAPES).batches is None
        monkeypatch.setattr("distsbi.data.source.IN_MEMORY_BYTES", 100)
        assert make_source(folder, SHAPES).batches is not None


def test_training_from_a_stream(folder):
    from flax import nnx

    from distsbi import MLPFlowPipeline

    config = {"nsteps": 30, "val_every": 10, "batch_size": 16, "calibrate": False}
    params = {"width": 16, "depth": 1}
    pipeline = MLPFlowPipeline(StreamedPairs(folder), None, 2, 3, ch_cond=2, params=params, training_config=config)
    assert pipeline.parameter_names == ("a", "b")
    losses, _ = pipeline.train(nnx.Rngs(0))
    assert np.isfinite(losses).all()
    assert pipeline.sample(rng=0, x_o=X[:1], nsamples=7).shape == (7, 2, 1)
    assert not TestAhead.threads()
