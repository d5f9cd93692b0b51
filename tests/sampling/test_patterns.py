"""The patterns of a joint model: posteriors of their own, and what a joint model is given, in whatever words."""

import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx

from distsbi import Flux1JointFlowPipeline, load
from distsbi.cli import cli
from distsbi.data import Standardizer
from distsbi.methods import FlowMatching
from distsbi.networks import Flux1Joint, Flux1JointParams
from distsbi.sampling import Tile
from distsbi.sampling.joint import JointPosterior
from distsbi.sampling.run import read_spec
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


def test_where_nothing_is_given_no_x_is_asked_for(pipeline, tmp_path):
    """Saved and loaded it is what it was, too: not the joint model, of as many parameters as that has tokens."""
    everything = pipeline.posterior.pattern([])
    assert "given x" not in repr(everything)
    theta = everything.sample(0, nsamples=3)
    density = everything.log_prob(theta)
    np.testing.assert_array_equal(everything.sample(0, np.zeros((1, 0, 1)), 3), theta)
    np.testing.assert_array_equal(pipeline.sample(0, given={}, nsamples=3), theta)
    everything.save(tmp_path / "run")
    loaded = load(tmp_path / "run", mesh={"data": 1})
    assert not isinstance(loaded, JointPosterior)
    assert loaded.parameter_names == ("theta_0", "theta_1", "x_0", "x_1")
    np.testing.assert_array_equal(loaded.sample(0, nsamples=3), theta)
    np.testing.assert_array_equal(loaded.log_prob(theta), density)
    words = ["sample", str(tmp_path / "run"), "-n", "3", "--mesh", "data=1", "--out", str(tmp_path / "draws.npy")]
    out = CliRunner().invoke(cli, words)
    assert out.exit_code == 0, out.output
    np.testing.assert_array_equal(np.load(tmp_path / "draws.npy"), theta)


def test_a_joint_model_of_parameters_alone_stays_one(pipeline, tmp_path):
    """Its fingerprint is that of runs that were saved before patterns said that they are such."""
    joint = pipeline.posterior.joint
    JointPosterior(joint, FlowMatching(), Standardizer.identity(4, 0), 4, mesh={"data": 1}).save(tmp_path / "run")
    assert "kind" not in read_spec(tmp_path / "run")
    loaded = load(tmp_path / "run", mesh={"data": 1})
    assert isinstance(loaded, JointPosterior) and loaded.dim_theta == 4


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:no sampling grid is under tolerance")
def test_the_grid_of_a_pattern_is_saved_with_the_joint_posterior(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("distsbi.sampling.calibrate.CANDIDATES", (("midpoint", 3),))
    posterior = pipeline._make_posterior(
        nnx.state(pipeline.posterior.joint, nnx.Param), Standardizer.identity(4, 0), None, {}
    )
    emulator = posterior.pattern(["theta"])
    first = posterior.calibrate(np.repeat(X, 3, 0))  # after which patterns are made anew
    assert posterior.pattern(["theta"]) is not emulator
    certificate = emulator.calibrate(np.repeat(X, 4, 0))
    assert (first["observations"], certificate["observations"]) == (3, 4)
    posterior.save(tmp_path / "run")
    for found in (emulator, posterior.pattern(["theta"]), load(tmp_path / "run", mesh={"data": 1}).pattern(["theta"])):
        assert found.facts["certificate"] == certificate
        assert (found.default_solver.rule, len(found.default_solver.times)) == ("midpoint", 4)
    with pytest.raises(ValueError, match="xs holds no observations to calibrate on"):
        posterior.calibrate(X[:0], ["theta"])
