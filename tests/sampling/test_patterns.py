"""The patterns of a joint model: posteriors of their own, and what a joint model is given, in whatever words."""

import numpy as np
import pytest
from flax import nnx

from distsbi import Flux1JointFlowPipeline
from distsbi.data import Standardizer
from distsbi.networks import Flux1Joint, Flux1JointParams
from distsbi.sampling import Tile
from tests.weights import shaken

PARAMS = Flux1JointParams(in_channels=1, dim_joint=4, num_heads=2, depth_single_blocks=1, val_emb_dim=8)
X = np.asarray([[[0.3], [-0.5]]], np.float32)


@pytest.fixture(scope="module")
def pipeline():
    """As after a training that left weights that all matter: two parameters and two data."""
    made = Flux1JointFlowPipeline(None, None, 2, 2, params=PARAMS, mesh={"data": 1})
    params = nnx.state(shaken(lambda: Flux1Joint(PARAMS, nnx.Rngs(0))), nnx.Param)
    made._posterior = made._make_posterior(params, Standardizer.identity(4, 0), None, {})
    made._posterior.tile = Tile(2, 16)
    return made


def test_num_samples_is_nsamples_here_too(pipeline, tmp_path):
    expected, given = pipeline.sample(0, X, 5), {"theta_0": 0.3}
    for asked in (pipeline, pipeline.posterior):
        np.testing.assert_array_equal(asked.sample(0, X, num_samples=5), expected)
        np.testing.assert_array_equal(asked.get_sampler(X)(0, num_samples=5), expected)
        np.testing.assert_array_equal(asked.sample_batched(key=0, condition=X, num_samples=5)[:, 0], expected)
        assert asked.sample(0, given=given, num_samples=5).shape == (5, 3, 1)
        assert asked.sample_and_log_prob(0, X, num_samples=5)[0].shape == (5, 2, 1)
        assert asked.sample_dataset(tmp_path / "draws", 0, X, num_samples=5).nsamples == 5
        with pytest.raises(ValueError, match="give nsamples or num_samples, only one"):
            asked.sample(0, given=given, nsamples=5, num_samples=5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["x"], r"given must be a dict of what is known by name, such as .*; got \['x'\]"), ("x", "given must be a dict"),
        ({"x": {"x_0": 1.0}}, r"given\['x'\] must be an array of real numbers of shape \(2, 1\); got dict"),
        ({"theta_0": "one"}, "array of real numbers"), ({"theta_0": "1"}, "array of real numbers"), ({"x": [[1.0], [1.0, 2.0]]}, "array of numbers"),
    ],
)  # fmt: skip
def test_what_is_given_is_numbers_by_name(pipeline, given, says):
    with pytest.raises(ValueError, match=says):
        pipeline.sample(0, given=given, nsamples=3)
