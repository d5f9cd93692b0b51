"""Models of GenSBI 0.5.1: the files of its `export_safetensors` are read, and its numbers are ours. The fixture is made by benchmarks/gensbi_numbers.py."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distsbi import Flux1JointParams, Flux1Params, SimformerParams, import_gensbi
from distsbi.methods import EDM
from distsbi.networks import NETWORKS, Conditional, Flux1
from distsbi.networks.gensbi import GenSBIModel, from_gensbi, read_safetensors, to_gensbi
from distsbi.pipelines import ConditionalPipeline

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "gensbi_exports.npz"
CASES = ("flux1", "flux1_pos1d", "flux1joint_sum", "flux1joint_concat", "simformer")
MAKE = dict(NETWORKS.values())
PARAMS = {"Flux1": Flux1Params, "Flux1Joint": Flux1JointParams, "Simformer": SimformerParams}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(path of the safetensors file, our parameters, arrays, keywords of the import)"""
    with np.load(FIXTURE) as file:
        arrays = {key.split("/")[1]: file[key] for key in file.files if key.startswith(request.param + "/")}
    path = tmp_path / "model.safetensors"
    path.write_bytes(arrays.pop("safetensors").tobytes())
    fields = json.loads(str(arrays.pop("params")))
    params = PARAMS[fields.pop("class")].from_dict(fields)
    return path, params, arrays, {} if isinstance(params, Flux1Params) else {"dim_obs": 2}


def test_the_numbers_are_gensbis(case):
    """The prediction for the parameters given the data, in float32: within 1e-5 of the largest."""
    path, params, arrays, options = case
    posterior = import_gensbi(path, params, mesh={"data": 1}, **options)
    network = posterior.network
    whole = network.network if isinstance(network, Conditional) else network
    assert whole.params.conditioning == "joint"
    values = jnp.asarray(arrays["values"])
    with jax.default_matmul_precision("highest"):
        velocity = nnx.jit(lambda v, t, y, x: v(t, y, v.encode(x)))(
            network, jnp.asarray(arrays["t"]), values[:, None, :2], values[:, 2:]
        )[:, 0]
    expected = arrays["velocity"][:, :2]
    np.testing.assert_allclose(velocity, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    tree, back = read_safetensors(path), to_gensbi(whole)
    assert set(back) == {p for p, value in tree.items() if value.size and p[-1] != "pe"}
    for p, value in back.items():
        np.testing.assert_array_equal(value.ravel(), tree[p].ravel())


def test_an_imported_model_draws(case):
    path, params, arrays, options = case
    posterior = import_gensbi(path, params, names=("a", "b"), mesh={"data": 2}, **options)
    x_o = arrays["values"][:1, 2:]
    draws = posterior.sample(0, x_o, 30, steps=8)
    assert draws.shape == (30, 2, 1) and np.isfinite(draws).all()
    # GenSBI's own flow: Euler on the raw state
    z = posterior.sample(0, x_o, 30, steps=1, solver="euler", return_trajectory=True)[0]
    network = posterior.network
    y = jnp.asarray(z)[None]
    graphdef, state = nnx.split(network)
    velocity = jax.jit(lambda s, t, y, x: (lambda n: n(t, y, n.encode(x)))(nnx.merge(graphdef, s)))
    for i in range(8):
        y = y + 0.125 * velocity(state, i / 8, y, jnp.asarray(x_o))
    by_hand = posterior.sample(0, x_o, 30, step_size=0.125)
    np.testing.assert_allclose(by_hand, np.asarray(y)[0], atol=1e-4)


def test_edm_of_other_noise(case):
    """The network is told ln(sigma) / 4, so its weights serve every range of sigma: by hand, one Euler step from sigma_max to sigma_min and the last denoising."""
    path, params, arrays, options = case
    method = EDM(sigma_min=0.01, sigma_max=50.0)
    posterior = import_gensbi(path, params, method=method, mesh={"data": 1}, **options)
    assert posterior.method == method
    x_o = jnp.asarray(arrays["values"][:1, 2:])
    path_of_draws = posterior.sample(0, x_o, 5, steps=1, solver="euler", return_trajectory=True)

    @nnx.jit
    def denoised(network, y, sigma):
        c_in, c_skip, c_out = (1 + sigma**2) ** -0.5, 1 / (1 + sigma**2), sigma * (1 + sigma**2) ** -0.5
        return c_skip * y + c_out * network(jnp.log(sigma) / 4, c_in * y, network.encode(x_o))

    y = jnp.asarray(path_of_draws[0])[None]
    clean = denoised(posterior.network, y, 50.0)
    y = clean + 0.01 * (y - clean) / 50.0  # Karras et al., algorithm 1
    np.testing.assert_allclose(path_of_draws[-1], denoised(posterior.network, y, 0.01)[0], rtol=1e-4, atol=1e-3)


def test_errors(case, tmp_path):
    path, params, _, options = case
    if options:
        with pytest.raises(ValueError, match="dim_obs is missing"):
            import_gensbi(path, params)
        wider = dataclasses.replace(params, dim_joint=6)
    else:
        with pytest.raises(ValueError, match="this one has 2 parameters by its params: leave out dim_obs=3"):
            import_gensbi(path, params, dim_obs=3)
        wider = dataclasses.replace(params, dim_obs=3)
    with pytest.raises(ValueError, match="names must be 2 different ones"):
        import_gensbi(path, params, names=("a", "b", "c"), **options)
    tree = read_safetensors(path)
    odd = {**tree, ("final_layer", "linear", "rngs", "kernel"): np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="final_layer/linear/rngs/kernel: not a parameter of this network"):
        from_gensbi(nnx.eval_shape(lambda: MAKE[type(params)](params, nnx.Rngs(0))), odd)
    with pytest.raises(ValueError, match="method must be one of flow"):
        import_gensbi(path, params, method="vp", **options)
    with pytest.raises(ValueError, match="params must be Flux1Params"):
        import_gensbi(path, {}, dim_obs=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        import_gensbi(tmp_path / "none.safetensors", params, dim_obs=2)
    with pytest.raises(ValueError, match="these weights do not belong to"):
        import_gensbi(path, wider, **options)


@pytest.mark.long
def test_a_model_with_gensbis_signature():
    """A module written for GenSBI, adapted, predicts what the same weights do as ours."""
    params = Flux1Params(
        in_channels=1, context_in_dim=1, dim_obs=2, dim_cond=3, num_heads=2, axes_dim=(4, 0), depth=1, depth_single_blocks=1
    )  # fmt: skip
    inner = Flux1(params, nnx.Rngs(3))

    class Theirs(nnx.Module):
        def __init__(self):
            self.inner = inner

        def __call__(self, t, obs, obs_ids, cond, cond_ids):
            np.testing.assert_array_equal(obs_ids, [[[0, 0], [1, 0]]])  # index, side
            np.testing.assert_array_equal(cond_ids, [[[0, 1], [1, 1], [2, 1]]])
            return self.inner(t.reshape(-1), obs[:, None], self.inner.encode(cond))[:, 0]

    adapted = GenSBIModel(Theirs(), 2, 3)
    theta, x = jax.random.normal(jax.random.key(0), (4, 5, 2, 1)), jax.random.normal(jax.random.key(1), (4, 3, 1))
    both = nnx.jit(lambda a, b: (a(0.3, theta, a.encode(x)), b(0.3, theta, b.encode(x))))(adapted, inner)
    np.testing.assert_allclose(*both, atol=1e-5)
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(200, 2, 1)).astype("f4"), rng.normal(size=(200, 3, 1)).astype("f4")
    config = {"nsteps": 4, "batch_size": 16, "calibrate": False, "show_progress": False}
    pipeline = ConditionalPipeline(adapted, pairs, None, 2, 3, training_config=config, mesh={"data": 2})
    pipeline.train(nnx.Rngs(0))
    assert pipeline.sample(rng=0, x_o=np.zeros((1, 3, 1)), nsamples=5).shape == (5, 2, 1)
