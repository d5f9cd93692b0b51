"""Whether a saved run is one that a pipeline can take up: of the same sizes, network, method and prior."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from distsbi.data.bijection import Support
from distsbi.data.prior import default_names, same_parameters
from distsbi.data.standardise import Standardizer
from distsbi.networks import Embedded, Unconditional, network_name
from distsbi.sampling import Posterior
from distsbi.sampling.joint import JointPosterior
from distsbi.sampling.run import load, model_spec, read_spec
from distsbi.training.checkpoints import differences


def saved_run(
    path: str | os.PathLike[str],
    model: Any,
    makes: type[Posterior],
    sizes: list[int],
    mesh: jax.sharding.Mesh,
    make: Callable[[Standardizer], Posterior],
) -> tuple[Posterior, Standardizer]:
    """(the posterior saved at `path`, its scales) for a pipeline of this model that makes posteriors of the kind `makes`, of `sizes` (dim_theta,
    ch_theta, dim_x, ch_x). `make`: makes one with these scales.

    Raises ValueError naming what differs, and as `distsbi.load` does.
    """
    spec = read_spec(path)
    if list(spec["sizes"]) != sizes:
        raise ValueError(
            f"{path} holds a run of other sizes, (dim_theta, ch_theta, dim_x, ch_x) = {spec['sizes']}, than this pipeline, {sizes}; make the "
            f"pipeline that it was trained with, or distsbi.load it."
        )
    found = load(path, mesh=mesh, network=_own_for(spec["network"], model))
    if type(found) is not makes:
        if not isinstance(found, JointPosterior) and spec["network"].get("view") == "conditional":
            raise ValueError(
                f"{path} holds one conditional of a joint model, or its student; distsbi.load it, or restore the run that it was made of."
            )
        kind = "joint" if isinstance(found, JointPosterior) else "conditional"
        raise ValueError(
            f"{path} holds a {kind} model; restore it in the pipeline that it was trained with, or distsbi.load it."
        )
    scales = found.joint_standardizer if isinstance(found, JointPosterior) else found.weights.standardizer
    scales = jax.tree.map(np.asarray, scales)
    made = make(scales)
    if made.is_unconditional != found.is_unconditional:
        what = "a density without conditions" if found.is_unconditional else "a posterior given data"
        raise ValueError(
            f"{path} holds {what}; restore it in the pipeline that it was trained with, or distsbi.load it."
        )
    here, there = model_spec(made), model_spec(found)
    differing = [name for name in ("network", "sizes", "method") if here[name] != there[name]]
    if differing:
        values = "; ".join(differences(*({name: spec[name] for name in differing} for spec in (there, here))))
        raise ValueError(
            f"{path} holds a run of another {' and '.join(differing)} than this pipeline ({values}); make the pipeline that it was trained "
            f"with, or distsbi.load it."
        )
    return found, scales


def common_names(path: str | os.PathLike[str], names: tuple[str, ...], found: Posterior) -> tuple[str, ...]:
    """The names of the parameters, of the run or of the pipeline where one of them has none. Raises ValueError if they are of other parameters."""
    if not same_parameters(names, found.parameter_names):
        raise ValueError(
            f"{path} was trained with the parameters {', '.join(found.parameter_names)}, and this pipeline is of {', '.join(names)}: give the prior, "
            f"or the pairs, that it was trained with."
        )
    return names if found.parameter_names == default_names(len(names)) else found.parameter_names


def check_prior(
    path: str | os.PathLike[str],
    names: Sequence[str],
    supports: Sequence[Support],
    scales: Standardizer,
) -> None:
    """Raises ValueError if a prior has another support than the one that the run was trained with, whose scales cut others off."""
    for name, here, there in zip(names, supports, scales.bijection.supports, strict=False):
        if (np.float32(here.low), np.float32(here.high)) != (there.low, there.high):
            raise ValueError(
                f"{path} was trained with {name} in ({there.low:g}, {there.high:g}), and the prior of this pipeline has it in ({here.low:g}, "
                f"{here.high:g}): give the prior that it was trained with, or train anew."
            )


def _own_for(described: dict[str, Any], model: Any) -> Any:
    """Of a model what a run so described cannot make by itself: a user's own network, or one behind a user's own embedding nets."""
    nets = described.get("embedded", {}).get("nets") or {}
    inner = model.network if isinstance(model, (Embedded, Unconditional)) else model
    if described["name"] is None and network_name(inner) is None:
        return nnx.clone(inner if isinstance(model, Unconditional) else model)
    return nnx.clone(model) if None in nets.values() and isinstance(model, Embedded) else None
