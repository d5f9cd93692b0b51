"""What a user gives a pipeline, checked and brought into its form: networks, embedding nets, augmentations, names of parameters."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from distsbi.data.pairs import PairsFolder, open_pairs
from distsbi.data.prior import default_names, parse_prior
from distsbi.networks import Layout
from distsbi.tasks import TASKS, get_task


def check_module(model: Any) -> None:
    """Raises ValueError for what is no user's own network."""
    if not isinstance(model, nnx.Module) or not callable(getattr(model, "encode", None)) or not callable(model):
        raise ValueError(
            f"model must be a flax.nnx.Module with encode(x) and __call__(t, theta_t, context); got {type(model).__name__}. "
            f"See distsbi.networks.Network."
        )
    check_state(model)


def check_output(model: Any, context: Callable[[Any], Any], dim: int, channels: int) -> None:
    """Raises ValueError if what a user's own network predicts has not the shape of what is drawn, for times as in training and as in sampling, or if what
    it encodes is not an array, or several, with a row for each observation. Nothing is computed. `context`: what it encodes, of two observations."""

    def predict(state: Any, t: Array) -> tuple[Array, Any]:
        network = nnx.merge(graphdef, state)
        encoded = context(network)
        return network(t, jnp.zeros(shape), encoded), encoded

    name, shape, (graphdef, state) = type(model).__name__, (2, 3, dim, channels), nnx.split(model)
    for times, when in (((2, 3), "as in training"), ((), "one for all draws, as in sampling")):
        t = f"t of {list(times)} ({when})"
        try:
            found, encoded = jax.eval_shape(predict, state, jnp.zeros(times))
        except Exception as error:
            raise ValueError(
                f"{name} fails on theta_t of [batch, draws, dim, channels], {list(shape)}, {t} and what it encodes of two observations: {error} "
                f"See distsbi.networks.Network."
            ) from error
        if getattr(found, "shape", None) != shape:
            raise ValueError(
                f"{name} must predict [batch, draws, dim, channels], {list(shape)} for theta_t of that shape and {t}; it gives "
                f"{list(found.shape) if hasattr(found, 'shape') else type(found).__name__}. See distsbi.networks.Network."
            )
        if wrong := [leaf.shape for leaf in jax.tree.leaves(encoded) if leaf.shape[:1] != (2,)]:
            raise ValueError(
                f"{name}.encode must return arrays with a row for each observation; of two it gives one of shape {list(wrong[0])}. "
                f"See distsbi.networks.Network."
            )


def check_state(model: Any) -> None:
    """Raises ValueError for a module that keeps more than weights."""
    other = {type(leaf).__name__ for _, leaf in nnx.to_flat_state(nnx.state(model)) if not isinstance(leaf, nnx.Param)}
    if other:
        raise ValueError(
            f"{type(model).__name__} keeps state beside its weights ({', '.join(sorted(other))}), which sampling could not carry: "
            f"leave out dropout and batch norm (layer norm does)."
        )


def nets_by_part(layout: Layout, embedding: Any) -> dict[str, Any] | None:
    """The embedding net of every part by name. Raises ValueError for nets of other parts."""
    if embedding is None:
        return None
    nets = dict(embedding) if isinstance(embedding, Mapping) else dict.fromkeys(layout.names[:1], embedding)
    if set(nets) != set(layout.names):
        raise ValueError(f"embedding must be a dict with a net for each of {list(layout.names)}; got {sorted(nets)}.")
    return nets


def on_packed(augment: Callable[..., tuple[Array, Any]], layout: Layout) -> Callable[..., tuple[Array, Array]]:
    """The user's `augment` on data that are packed."""

    def packed(key: Array, theta: Array, x: Array) -> tuple[Array, Array]:
        theta, x = augment(key, theta, layout.unpack(x))
        return theta, layout.join(x)

    return packed


def prior_of(folder: PairsFolder) -> Any:
    """The prior that a folder says its pairs were drawn from: a task's, or distributions of numbers by name. None where it says none."""
    task, texts = folder.source.get("task"), folder.source.get("prior")
    if task in TASKS:
        return get_task(task).prior
    return parse_prior(texts) if texts and isinstance(texts, Mapping) else None


def brought_by(dataset: Any, prior: Any) -> tuple[Any, tuple[str, ...] | None]:
    """(the prior, the names of the parameters) that a task or a folder of pairs brings; None where it has none. `prior`: the one that is given."""
    if not isinstance(dataset, (str, os.PathLike)):
        return getattr(dataset, "prior", None), getattr(dataset, "parameter_names", None)
    folder = open_pairs(dataset)
    carried = prior_of(folder)
    return carried, names_of(dataset, folder, carried if prior is None else prior)


def names_of(path: str | os.PathLike[str], folder: PairsFolder, prior: Any) -> tuple[str, ...]:
    """The parameters of a folder of pairs. Raises ValueError if the prior has other names for them, or another order."""
    names, given = folder.names, getattr(prior, "names", None)
    unnamed = names == default_names(len(names))
    if given is not None and not unnamed and len(given) == len(names) and tuple(given) != names:
        raise ValueError(
            f"the pairs in {path} are of {', '.join(names)}, in this order; the prior is of {', '.join(given)}. Give the prior in the order of "
            f"the pairs, with their names."
        )
    return names
