"""What float32 would take from data is refused, not taken."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi import MLPFlowPipeline
from distsbi.data import Prior, Support, read_pairs, write_pairs
from distsbi.data.float32 import as_float32

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize(
    "values",
    [
        2459000.5 + 0.05 * DRAW.normal(size=(500, 1)),  # days of Julius
        1.7e9 + DRAW.normal(size=(500, 1)),  # seconds since 1970
        (1_700_000_000 + DRAW.integers(0, 50, size=(500, 1))),
    ],
)
def test_what_it_cannot_tell_apart_is_named(values):
    array = np.concatenate([np.ones_like(values), values], 1)
    with pytest.raises(ValueError, match=r"x\[:, 1\] goes from .* float32 cannot tell apart: subtract a reference"):
        as_float32("x", array)
    with pytest.raises(ValueError, match=r"2 columns are like this"):
        as_float32("x", np.concatenate([array, values], 1))


@pytest.mark.parametrize(
    "values",
    [
        DRAW.normal(size=(500, 2)), 1e4 + DRAW.normal(size=(500, 2)), np.full((500, 2), 0.1), 0.1 + 1e-16 * DRAW.normal(size=(500, 2)),
        DRAW.integers(0, 9, size=(500, 2)), np.full((500, 2), np.nan), np.full((500, 2), 1e300), (1.7e9 + DRAW.normal(size=(5, 2))),
        (1.7e9 + DRAW.normal(size=(500, 2))).astype(np.float32), np.zeros((0, 2)), 1e-30 * DRAW.normal(size=(500, 2)),
    ],
)  # fmt: skip
def test_all_else_is_rounded(values):
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(as_float32("x", values), values.astype(np.float32))


def test_wherever_data_come_in(tmp_path):
    theta, x = DRAW.normal(size=(100, 1)), 1.7e9 + DRAW.normal(size=(100, 3))
    with pytest.raises(ValueError, match=r"x\[:, 0, 0\] goes from|x\[:, 0\] goes from"):
        MLPFlowPipeline((theta, x), None, 1, 3)
    with pytest.raises(ValueError, match="such as"):
        MLPFlowPipeline((theta, {"a": x, "b": theta}), None, 1, {"a": 3, "b": 1})
    with pytest.raises(ValueError, match="such as"):
        MLPFlowPipeline((theta, np.tile(x[:, None], (1, 3, 1))), None, 1, (3, 3))
    with pytest.raises(ValueError, match="such as"):
        write_pairs(tmp_path / "own", theta, x)
    columns = {
        name: pa.FixedSizeListArray.from_arrays(a.ravel(), a.shape[1]) for name, a in (("theta", theta), ("x", x))
    }
    (tmp_path / "others").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "others" / "part-0.parquet")
    with pytest.raises(ValueError, match=r"part-0.parquet: x\[:, 0, 0\] goes from"):
        read_pairs(tmp_path / "others")


def test_a_prior_that_it_cannot_tell_apart():
    with pytest.raises(
        ValueError, match=r"too narrow for float32 where it lies: let the parameter be the difference from a reference"
    ):
        Support(1.7e9, 1.7e9 + 10)
    import numpyro.distributions as dist

    with pytest.raises(ValueError, match="too narrow"):
        MLPFlowPipeline(None, None, 1, 3, prior=Prior(t=dist.Uniform(1.7e9, 1.7e9 + 1000)))
    Support(1.0, 1.0001)
