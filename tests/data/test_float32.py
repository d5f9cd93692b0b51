"""What float32 would take from data is refused, or told where it may be nothing; not taken in silence."""

import warnings

import numpy as np
import numpyro.distributions as dist
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import distsbi
from distsbi import MLPFlowPipeline
from distsbi.data import Prior, Support, read_pairs, write_pairs
from distsbi.data.float32 import check_float32, warn_of_steps

DRAW = np.random.default_rng(0)
DAYS = 2459000.5 + 0.2 * DRAW.normal(size=(500, 1))  # of Julius
SECONDS = 1.7e9 + DRAW.normal(size=(500, 1))  # since 1970


@pytest.mark.parametrize("values", [DAYS, SECONDS, 1_700_000_000 + DRAW.integers(0, 50, size=(500, 1))])
def test_what_it_cannot_tell_apart_is_named(values):
    array = np.concatenate([np.ones_like(values), values], 1)
    with pytest.raises(ValueError, match=r"theta\[:, 1\] goes from .* float32 cannot tell apart: subtract a reference"):
        check_float32("theta", array)
    with pytest.raises(ValueError, match=r"2 columns are like this"):
        check_float32("theta", np.concatenate([array, values], 1))


@pytest.mark.parametrize("relative", [1e-11, 1e-9, 1e-8])
def test_what_may_be_a_constant_is_told(relative):
    """Such as what a solver of an ODE conserves."""
    values = 1000 * (1 + relative * DRAW.uniform(size=(500, 2)))
    with pytest.warns(UserWarning, match=r"x\[:, .\] goes from .* taken for a constant.*2 columns"):
        check_float32("x", values, constants=True)
    with pytest.raises(ValueError, match=r"x\[:, 2\] goes from .* cannot tell apart"):
        check_float32("x", np.concatenate([values, DAYS], 1), constants=True)


@pytest.mark.parametrize(
    "values",
    [
        DRAW.normal(size=(500, 2)), 1e4 + DRAW.normal(size=(500, 2)), np.full((500, 2), 0.1), 0.1 + 1e-16 * DRAW.normal(size=(500, 2)),
        DRAW.integers(0, 9, size=(500, 2)), np.full((500, 2), np.nan), np.full((500, 2), 1e300), SECONDS[:5], SECONDS.astype(np.float32),
        np.zeros((0, 2)), 1e-30 * DRAW.normal(size=(500, 2)), np.zeros((500, 2)), DRAW.normal(size=(500, 1)) > 0,
    ],
)  # fmt: skip
def test_all_else_passes(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_float32("x", values)


def test_wherever_data_come_in(tmp_path):
    theta, x = DRAW.normal(size=(500, 1)), np.tile(DAYS, 3)
    with pytest.raises(ValueError, match=r"x\[:, 0\] goes from"):
        MLPFlowPipeline((theta, x), None, 1, 3)
    with pytest.raises(ValueError, match=r"a\[:, 0\] goes from"):
        MLPFlowPipeline((theta, {"a": x, "b": theta}), None, 1, {"a": 3, "b": 1})
    with pytest.raises(ValueError, match=r"x\[:, 0, 0\] goes from"):
        MLPFlowPipeline((theta, np.tile(x[:, None], (1, 3, 1))), None, 1, (3, 3))
    with pytest.raises(ValueError, match=r"x\[:, 0\] goes from"):
        write_pairs(tmp_path / "own", theta, x)


@pytest.mark.parametrize("nights", [1, 10])
def test_a_folder_of_others_is_judged_as_a_whole(tmp_path, nights):
    """Of one night in a file they are data, if there are many nights."""
    for night in range(nights):
        theta, x = DRAW.normal(size=(100, 1)), DAYS[:100] + 365 * night
        columns = {name: pa.FixedSizeListArray.from_arrays(a.ravel(), 1) for name, a in (("theta", theta), ("x", x))}
        pq.write_table(pa.table(columns), tmp_path / f"part-{night}.parquet")
    if nights > 1:
        assert len(read_pairs(tmp_path).theta) == 1000
        return
    with pytest.raises(ValueError, match=r": x\[:, 0, 0\] goes from"):
        read_pairs(tmp_path)


def test_batches_are_not_judged_alone():
    batches = [(DRAW.normal(size=(100, 1)), DAYS[:100] + 365 * night) for night in range(10)]
    config = {"nsteps": 2, "batch_size": 50, "calibrate": False, "show_progress": False}
    MLPFlowPipeline(batches, None, 1, 1, training_config=config)


def test_a_prior_that_it_cannot_tell_apart():
    with pytest.raises(ValueError, match=r"too narrow for float32 where it lies: let the parameter be the difference"):
        Support(1.7e9, 1.7e9 + 10)
    with pytest.raises(ValueError, match="too narrow"):
        MLPFlowPipeline(None, None, 1, 3, prior=Prior(t=dist.Uniform(1.7e9, 1.7e9 + 1000)))
    Support(1.0, 1.0001)


def night(theta, rng):
    """Of the time of an event, in days of Julius."""
    return 2459000.5 + theta + 0.1 * rng.normal()


def test_what_was_rounded_before_is_told_in_training(tmp_path):
    """A simulator's results are float32 in its folder, and so are a user's own files."""
    out = distsbi.simulate(night, Prior(t=dist.Normal(0.0, 0.2)), 100, tmp_path / "pairs", workers=0).path
    pipeline = MLPFlowPipeline(out, None, 1, 1)
    with pytest.warns(
        UserWarning,
        match=r"x\[:, 0, 0\] goes from 24.* in \d+ steps of float32: .*subtract a reference",
    ) as told:
        pipeline.train(0, nsteps=1, batch_size=8, calibrate=False)
    assert told[0].filename == __file__  # the user's line, not one of ours


@pytest.mark.parametrize(
    "values", [1 + 1e-4 * DRAW.normal(size=500), DAYS[:5], np.full(500, 3e9), np.full(500, np.nan), 9.0 * (DRAW.normal(size=500) > 0), [1, 1 + 1e-7] * 50]
)  # fmt: skip
def test_all_else_goes_through_enough_steps(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_steps("x", np.asarray(values, np.float32))


def test_a_sum_that_is_constant_but_for_rounding():
    parts = DRAW.uniform(size=(500, 50)).astype("f4")
    with pytest.warns(
        UserWarning,
        match=r"x\[:, 0\] goes from 0.99.* if it is a constant but for rounding, leave it out; if not, subtract",
    ):
        warn_of_steps("x", (parts / parts.sum(1, keepdims=True)).cumsum(1, dtype="f4")[:, -1:])


def test_what_is_mostly_rounded_away():
    with pytest.warns(
        UserWarning, match=r"x\[:, 0\] goes from .* what it says is mostly rounded away; subtract a reference value"
    ):
        warn_of_steps("x", (DAYS + 20 * DRAW.normal(size=(500, 1))).astype("f4"))
