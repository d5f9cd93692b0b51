"""The contract matrix: every method with every network, solver and place of execution. A new row is one line.

CI runs a selection in which every pair of rows of two tables occurs, `make test-full` all combinations.
"""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from distsbi import load
from distsbi.data import Standardizer, Support
from distsbi.methods import METHODS
from distsbi.networks import (
    CNN,
    MLP,
    NETWORKS,
    CNNParams,
    Conditional,
    Embedded,
    Flux1JointParams,
    Flux1Params,
    JointNetwork,
    Layout,
    MLPParams,
    PatchEmbedding,
    PatchEmbeddingParams,
    SimformerParams,
)
from distsbi.sampling import JointPosterior, Posterior, Tile
from distsbi.solvers import RULES
from distsbi.training import TrainingConfig
from distsbi.training.update import ConditionMasks, Learner, conditional
from tests.compilations import Compilations
from tests.weights import shaken

pytestmark = pytest.mark.optimised  # without, one device and two differ in the last bit

NETWORK_ROWS = {
    "MLP": MLPParams(2, 3, width=8, depth=1, embed_depth=1),
    "Flux1": Flux1Params(
        in_channels=1, context_in_dim=1, dim_obs=2, dim_cond=3, num_heads=2, axes_dim=(4, 0), depth=1, depth_single_blocks=1
    ),
    "Flux1Joint": Flux1JointParams(in_channels=1, dim_joint=5, num_heads=2, depth_single_blocks=1, val_emb_dim=4),
    "Simformer": SimformerParams(
        in_channels=1, dim_joint=5, val_emb_dim=4, id_emb_dim=2, cond_emb_dim=2, num_heads=2, depth=1, fourier_features=8
    ),
    "Embedded": lambda rngs: Embedded(
        MLP(MLPParams(2, 2, ch_x=4, width=8, depth=1, embed_depth=1), rngs),
        {"": PatchEmbedding(PatchEmbeddingParams((3, 1), (2,), 4), rngs)}, Layout.of(3),
    ),
}  # fmt: skip


def with_cnn(rngs):
    net = CNN(CNNParams((3, 1), width=4, features=4), rngs)
    return Embedded(MLP(MLPParams(2, 3, ch_x=4, width=8, depth=1, embed_depth=1), rngs), {"": net}, Layout.of(3))


SOLVER_ROWS = [*RULES, "tsit5", "dopri5", "dopri8"]
PLACES = ["one device", "mesh of 8", "Ray worker"]
TABLES = [sorted(METHODS), sorted(NETWORK_ROWS), SOLVER_ROWS, PLACES]
X = np.asarray([[[0.3], [-0.5], [0.8]]], np.float32)


def selection(tables):
    """Combinations in which every pair of rows of two tables occurs, greedily."""

    def covers(row):
        return set(itertools.combinations(enumerate(row), 2))

    everything = list(itertools.product(*tables))
    left, chosen = set().union(*map(covers, everything)), []
    while left:
        chosen.append(max(everything, key=lambda row: len(left & covers(row))))
        left -= covers(chosen[-1])
    return chosen


SELECTED = set(selection(TABLES))
QUICK = {
    "MLP": PLACES,
    "Embedded": ["one device"],
}  # of the selection, in `make test`; the rest of it in `make test-long`


def marks(row):
    if row not in SELECTED:
        return pytest.mark.slow
    return [] if row[3] in QUICK.get(row[1], []) else pytest.mark.long


CASES = [pytest.param(*row, marks=marks(row), id="-".join(row).replace(" ", "_")) for row in itertools.product(*TABLES)]


def make_network(name):
    """With weights that all matter."""
    name, _, variant = name.partition(", ")
    row = NETWORK_ROWS[name]
    if variant == "joint":
        row = dataclasses.replace(row, conditioning="joint")
    elif variant == "CNN":
        row = with_cnn
    return shaken(lambda: row(nnx.Rngs(0)) if callable(row) else NETWORKS[name][1](row, nnx.Rngs(0)), scale=0.5)


def make_posterior(method, name, mesh, support=(-1.0, 1.0)):
    network, rng = make_network(name), np.random.default_rng(0)
    theta, x = rng.uniform(-1, 1, (60, 2, 1)).astype("f4"), rng.normal(size=(60, 3, 1)).astype("f4")
    supports = [Support(*support)] * 2
    options = {"mesh": mesh, "tile": Tile(4, 8), "names": ("a", "b")}
    if isinstance(network, JointNetwork):
        tokens = np.concatenate([theta, x], 1)
        scales = Standardizer.fit(tokens, np.zeros((60, 0, 1), "f4"), [*supports, *[Support()] * 3], linear=False)
        return JointPosterior(network, METHODS[method](), scales, 2, **options)
    return Posterior(network, METHODS[method](), Standardizer.fit(theta, x, supports), **options)


@pytest.fixture(scope="module")
def drawer():
    """An actor on a local Ray that draws from run directories."""
    ray = pytest.importorskip("ray")
    if ray.is_initialized():  # by the tests of the fan-out, in the same process
        ray.shutdown()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)

    @ray.remote
    class Drawer:
        def draw(self, path, x, n, options):
            return load(path, mesh={"data": 1}).sample(7, x, n, **options)

    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.environ["PYTHONPATH"]}
    yield Drawer.options(runtime_env={"env_vars": environment}).remote(), ray
    ray.shutdown()


def products(jaxpr):
    """The products of a program, those inside its loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def programs(network):
    """What a network computes as it is drawn from, and as a joint one is trained."""
    x, theta = jnp.zeros((1, 3, 1)), jnp.zeros((1, 4, 2, 1))
    if isinstance(network, JointNetwork):
        mask, values = jnp.asarray([[False, True, False, True, True]]), jnp.zeros((1, 5, 1))
        yield lambda values: network(0.5, values[:, None], network.encode(values, mask)), (values,)
        network = Conditional(network, (0, 1), (2, 3, 4))
    yield lambda x, theta: network(0.5, theta, network.encode(x)), (x, theta)


@pytest.mark.parametrize("network", [*sorted(NETWORK_ROWS), "Flux1, joint", "Simformer, joint", "Embedded, CNN"])
def test_float32_products_are_in_full_precision(network):
    """On GPUs and TPUs the default is TF32 or bfloat16, with which neither another tile nor a CPU gives the same draws."""
    found = []
    for program, values in programs(make_network(network)):
        both = jax.make_jaxpr(lambda *v, program=program: jax.jvp(program, v, v))(*values)
        found += products(both.jaxpr)
    found = [one for one in found if all(v.aval.dtype == jnp.float32 for v in one.invars)]
    assert len(found) > 4
    assert network != "Embedded, CNN" or any(one.primitive.name == "conv_general_dilated" for one in found)
    for one in found:
        assert one.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, one


def test_solvers_and_densities_too():
    """Whatever they multiply: CPUs refuse TF32, where it is the default."""
    with jax.default_matmul_precision("TF32_TF32_F32"):
        with pytest.raises(ValueError, match="not supported"):
            jnp.ones((2, 2)) @ jnp.ones((2, 2))
        posterior = make_posterior("flow", "MLP", {"data": 1})
        theta = posterior.sample(7, X, 5, steps=3)
        posterior.sample(7, X, 5, solver="tsit5")
        posterior.log_prob(theta, X, steps=3)


@pytest.mark.parametrize(("method", "network", "solver", "place"), CASES)
def test_contract(method, network, solver, place, request, tmp_path):
    """Shapes, dtypes, save and load; the draws are those of two devices, whatever the place; one compilation. Of any prior: with weights at random most
    methods end at the edges of an interval, where all draws are alike."""
    options = {"solver": solver} if solver in ("tsit5", "dopri5", "dopri8") else {"solver": solver, "steps": 3}
    if solver in RULES and method != "flow":
        options["steps"] = 12  # explicit steps from a noise of 80
    elif method != "flow":
        options |= {
            "rtol": 1e-6,
            "atol": 1e-6,
        }  # weights at random make rough paths, over which errors of 1e-5 grow to 1e-2
    posterior = make_posterior(method, network, {"data": 2}, ())
    draws = posterior.sample(7, X, 50, **options)
    assert draws.shape == (50, 2, 1)
    assert draws.dtype == np.float32
    assert len(np.unique(draws)) == draws.size
    with Compilations() as count:
        posterior.sample(7, 2 * X, 50, **options)
    assert not count.programs
    np.testing.assert_array_equal(posterior.sample(7, X, 21, **options), draws[:21])
    posterior.save(tmp_path / "run")
    if place == "Ray worker":
        actor, ray = request.getfixturevalue("drawer")
        again = ray.get(actor.draw.remote(str(tmp_path / "run"), X, 50, options))
    else:
        again = load(tmp_path / "run", mesh={"data": 1 if place == "one device" else 8}).sample(7, X, 50, **options)
    # adaptive steps read the method's functions of time as they go: exact for flow matching's, which are rational; others differ within their tolerances
    within = 0.0 if solver in RULES or method == "flow" else 5e-3 * draws.std()
    np.testing.assert_allclose(again, draws, rtol=0, atol=within)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_draws_keep_to_the_prior(method):
    posterior = make_posterior(method, "MLP", {"data": 2})
    for solver in ("heun", "euler_maruyama", "tsit5"):
        assert (np.abs(posterior.sample(7, X, 50, solver=solver)) < 1).all()


@pytest.mark.parametrize(
    ("method", "network"),
    [
        pytest.param(m, n, marks=[] if n == "MLP" and m in ("flow", "ve") else pytest.mark.long)
        for m, n in itertools.product(sorted(METHODS), sorted(NETWORK_ROWS))
    ],
)
def test_gradients_and_density(method, network):
    """The loss reaches every weight that the prediction depends on, and draws have the density of the way back; both share base and Jacobian, whose
    values test_density has."""
    name, network = network, make_network(network)
    graphdef, params, rest = nnx.split(network, nnx.Param, ...)
    joint = isinstance(network, JointNetwork)
    posterior = make_posterior(method, name, {"data": 1})
    scales = posterior.joint_standardizer if isinstance(posterior, JointPosterior) else posterior.weights.standardizer
    learner = Learner(
        graphdef, rest, METHODS[method](), scales, TrainingConfig().resolve(100), posterior.mesh, None, 0,
        pose=ConditionMasks() if joint else conditional,
    )  # fmt: skip
    theta, x = jax.random.uniform(jax.random.key(0), (64, 2, 1)), jax.random.normal(jax.random.key(1), (64, 3, 1))
    keys = jax.random.split(jax.random.key(2), 3)
    loss, gradient = jax.jit(jax.value_and_grad(learner.loss), static_argnums=5)(params, (theta, x), *keys, 2)
    assert np.isfinite(loss)
    silent = [
        jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not jnp.any(leaf != 0)
    ]  # fmt: skip
    assert not silent
    posterior = make_posterior(method, name, {"data": 1}, ())
    solver = {"solver": "rk4", "steps": 80}
    draws, density = posterior.sample_and_log_prob(3, X, 16, **solver)
    np.testing.assert_allclose(posterior.log_prob(draws, X, **solver), density, atol=1e-3)
