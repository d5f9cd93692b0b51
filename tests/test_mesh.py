import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distsbi import mesh as meshes


def test_meshes():
    assert dict(meshes.make_mesh().shape) == {"data": 8, "model": 1}
    assert dict(meshes.make_mesh({"data": 2}).shape) == {"data": 2, "model": 1}
    with pytest.warns(UserWarning, match='2 devices of this mesh do the same work: .* such as mesh={"data": -1}'):
        two = meshes.make_mesh({"data": -1, "model": 2})
    assert dict(two.shape) == {"data": 4, "model": 2}
    with pytest.warns(UserWarning, match="do the same work"):
        meshes.make_mesh(two)
    own = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meshes.make_mesh(own) is own


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ({"data": 9}, "needs 9 devices"), ({"rows": 2}, "unknown mesh axes"), ({"data": 0}, "positive"),
        ({"data": 1.7}, 'the size of mesh axis "data" must be a whole number, -1 or more; got 1.7'), ({"data": "two"}, "got 'two'"),
        ({"data": 1, "model": True}, 'axis "model" must be a whole number'), (3, "mesh must be"),
        (jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("x",)), "axis named"),
    ],
)  # fmt: skip
def test_bad_meshes(mesh, says):
    with pytest.raises(ValueError, match=says):
        meshes.make_mesh(mesh)


def test_fsdp_splits_the_largest_divisible_axis():
    mesh = meshes.make_mesh({"data": 4})
    tree = {"a": jnp.zeros((3, 8)), "b": jnp.zeros((16, 8)), "c": jnp.zeros((8,)), "d": jnp.zeros((3, 5))}
    specs = {k: tuple(s.spec) for k, s in meshes.state_shardings(mesh, tree, fsdp=True).items()}
    assert specs == {"a": (None, "data"), "b": ("data",), "c": (), "d": ()}
    assert all(s.spec == jax.P() for s in meshes.state_shardings(mesh, tree).values())
