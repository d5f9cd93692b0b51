"""Every network obeys the contract of DESIGN section 4: one row of the table each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distsbi.networks import (
    MLP,
    NETWORKS,
    Conditional,
    Flux1,
    Flux1Joint,
    Flux1JointParams,
    Flux1Params,
    MLPParams,
    Simformer,
    SimformerParams,
    make_network,
    network_name,
)
from tests.weights import shaken


def _flux(dim_x: int, **options) -> Flux1Params:
    return Flux1Params.default(3, dim_x, **options)


def _posterior(network, dim_x: int) -> Conditional:
    return Conditional(network, (0, 1, 2), tuple(range(3, 3 + dim_x)))


CASES = {
    "MLP": lambda dim_x: MLP(MLPParams(3, dim_x, width=16, depth=2), rngs=nnx.Rngs(0)),
    "Flux1": lambda dim_x: Flux1(_flux(dim_x), rngs=nnx.Rngs(0)),
    "Flux1Joint": lambda dim_x: _posterior(Flux1Joint(Flux1JointParams.default(3, dim_x)), dim_x),
    "Simformer": lambda dim_x: _posterior(Simformer(SimformerParams.default(3, dim_x)), dim_x),
}


@pytest.fixture(params=CASES)
def network(request):
    return shaken(lambda: CASES[request.param](4))


def test_every_network_has_a_case():
    assert set(CASES) == set(NETWORKS)


def test_shapes_and_times(network):
    x = jax.random.normal(jax.random.key(0), (2, 4, 1))
    theta = jax.random.normal(jax.random.key(1), (2, 5, 3, 1))
    context = nnx.jit(lambda network: network.encode(x))(network)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(context)} == {2}
    call = nnx.jit(lambda network, t: network(t, theta, context))
    one = call(network, 0.3)
    assert one.shape == theta.shape
    assert one.dtype == jnp.float32
    for t in (jnp.full((2,), 0.3), jnp.full((2, 5), 0.3)):
        np.testing.assert_allclose(call(network, t), one, atol=2e-5)
    assert float(jnp.abs(call(network, 0.9) - one).max()) > 1e-3
    with pytest.raises(ValueError, match="t must have shape"):
        network(jnp.zeros((2, 5, 1)), theta, context)


def test_draws_and_observations_do_not_mix(network):
    x = jax.random.normal(jax.random.key(0), (2, 4, 1))
    theta = jax.random.normal(jax.random.key(1), (2, 5, 3, 1))
    call = nnx.jit(lambda network, theta, x: network(0.3, theta, network.encode(x)))
    out, moved = call(network, theta, x), call(network, theta.at[0, 2].add(1.0), x.at[1].add(1.0))
    same = np.abs(np.asarray(moved - out)).max(axis=(2, 3)) < 1e-6
    assert same.tolist() == [[True, True, False, True, True], [False] * 5]


def test_round_trip(network):
    network = network.network if isinstance(network, Conditional) else network
    name = network_name(network)
    assert name is not None
    again = nnx.eval_shape(lambda: make_network(name, network.params.to_dict()))
    assert jax.tree.map(jnp.shape, nnx.state(again)) == jax.tree.map(jnp.shape, nnx.state(network))
    assert again.params == network.params
    with pytest.raises(ValueError, match="known are"):
        make_network("MPL", {})
    with pytest.raises(ValueError, match="depht"):
        make_network(name, {"depht": 3})


def _step_cost(dim_x: int) -> dict:
    network = CASES["MLP"](dim_x)
    context = network.encode(jnp.zeros((1, dim_x, 1)))
    step = (
        jax.jit(lambda theta, context: network(0.5, theta, context)).lower(jnp.zeros((1, 8, 3, 1)), context).compile()
    )
    text = step.as_text()
    names = re.findall(r"= \S+ ([a-z-]+)\(", text)
    assert "dot" in names or "fusion" in names
    return {"flops": step.cost_analysis()["flops"], "operations": sorted(names)}


def test_a_step_of_the_mlp_does_not_know_the_size_of_x():
    """Encode once: the compiled operations of one solver step are equal at dim_x = 10 and 1,000."""
    assert _step_cost(10) == _step_cost(1000)


def test_mlp_errors():
    for options, says in (
        ({"width": 0}, "at least 1"),
        ({"dtype": "float16"}, "dtype"),
        ({"time_features": 3}, "even"),
    ):
        with pytest.raises(ValueError, match=says):
            MLPParams(2, 2, **options)
