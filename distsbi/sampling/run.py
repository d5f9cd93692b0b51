"""The run directory: what a trained posterior is on disk.

    run/  spec.json        all that rebuilds the posterior (the default tile by kind of device), and which folder of weights/ it belongs to
          weights/<digest>/ averaged weights (orbax), restorable to any mesh
          checkpoints/     full training state, written while training
          metrics.jsonl    one line per validation

Nothing in it is pickled, and loading it runs no code from it.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from distsbi import mesh as meshes, processes
from distsbi.data.standardise import Standardizer
from distsbi.environment import versions
from distsbi.files import full_disk_says, write_json
from distsbi.methods import METHODS, make_method
from distsbi.networks import NETWORKS, Conditional, Embedded, Unconditional, make_network, network_name
from distsbi.networks.embedding import embedded_shape, rebuild
from distsbi.networks.observation import Layout
from distsbi.sampling.joint import JointPosterior
from distsbi.sampling.posterior import Posterior
from distsbi.sampling.tiles import Tile
from distsbi.solvers import solver_from_dict

FORMAT, OLDEST = 6, 5
VIEWS: dict[str, Any] = {"conditional": Conditional, "unconditional": Unconditional}  # of a joint network
SPEC, WEIGHTS = "spec.json", "weights"
KINDS = ("student", "unconditional")  # what a posterior may be that its network does not say
ALL_FREE = "all_free"  # beside them: the pattern of a joint model in which nothing is given, which is else told from the joint model by its scales
REQUIRED = ("network", "sizes", "method", "standardizer", "parameter_names", "solver", "tile", "weights",
            "weights_sha256", "fingerprint", "versions", "facts")  # fmt: skip


def model_spec(posterior: Posterior) -> dict[str, Any]:
    """The part of the spec that defines p(theta | x), without the weights."""
    network = posterior.network
    view = next((name for name, cls in VIEWS.items() if type(network) is cls), None)
    inner: Any = network.network if view else network  # type: ignore[attr-defined]
    embedded = {"embedded": inner.params.to_dict()} if isinstance(inner, Embedded) else {}
    inner = inner.network if embedded else inner
    name = network_name(inner)
    params = inner.params.to_dict() if name else {}
    method = next(key for key, cls in METHODS.items() if type(posterior.method) is cls)
    standardizer = (
        posterior.joint_standardizer if isinstance(posterior, JointPosterior) else posterior.weights.standardizer
    )
    kind = [name for name in KINDS if getattr(posterior, f"is_{name}")]
    if isinstance(network, Conditional) and not network.given and not isinstance(posterior, JointPosterior):
        kind.append(ALL_FREE)
    pattern = {"free": list(network.free), "given": list(network.given)} if isinstance(network, Conditional) else None
    return {
        "network": {"name": name, "params": params, "view": view, "pattern": pattern, **embedded},
        "sizes": [posterior.dim_theta, posterior.ch_theta, posterior.dim_x, posterior.ch_x],
        "method": {"name": method, "params": posterior.method.to_dict()},
        "standardizer": standardizer.to_dict(),
        "parameter_names": list(posterior.parameter_names),
        **({"kind": kind} if kind else {}),
    }


def fingerprint(model: dict[str, Any], weights_sha256: str) -> str:
    """SHA-256 of a `model_spec` and its weights. Hexadecimal."""
    text = json.dumps({**model, "weights_sha256": weights_sha256}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def make_spec(posterior: Posterior) -> dict[str, Any]:
    """What spec.json holds, but for where the weights are."""
    model, digest = model_spec(posterior), weights_digest(posterior.weights.params)
    return {
        "format": FORMAT,
        **model,
        "solver": posterior.default_solver.to_dict(),
        "tile": {kind: dataclasses.asdict(tile) for kind, tile in posterior.tile_by_kind.items()},
        "weights_sha256": digest,
        "fingerprint": fingerprint(model, digest),
        "versions": versions(),
        "facts": _as_json(posterior.facts),
    }


def _as_json(fact: Any) -> Any:
    """A fact with None for every number that JSON has no word for: NaN and the infinities."""
    if isinstance(fact, Mapping):
        return {name: _as_json(value) for name, value in fact.items()}
    if isinstance(fact, (list, tuple)):
        return [_as_json(value) for value in fact]
    return None if isinstance(fact, float) and not math.isfinite(fact) else fact


def _checkpointer() -> Any:
    """Orbax for this process alone, however many there are: weights are small, and each process has all of them."""
    import orbax.checkpoint as ocp

    if processes.count() == 1:
        return ocp.StandardCheckpointer()
    own = processes.index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def weights_digest(params: nnx.State) -> str:
    """SHA-256 of the weights: path, shape and float32 bytes of every leaf, in path order. Hexadecimal."""
    digest = hashlib.sha256()
    for path, leaf in sorted(_leaves(params).items()):
        array = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _leaves(params: nnx.State) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def check_place(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if a run is not to be written to `path`: a file, or a folder that holds pairs, draws or a catalog."""
    root = Path(path).absolute()
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; give a folder for the run.")
    others = [*root.glob("*.parquet"), *root.glob("_distsbi*")]
    if others:
        raise ValueError(f"{root} holds something else, such as {others[0].name}; give another folder for the run.")


def save(path: str | os.PathLike[str], posterior: Posterior) -> None:
    """Writes weights and spec.json under `path`. Replacing spec.json is the one step from the run that `path` held before to the new one:
    the old weights go after it.

    A user's own network is saved too, and needs `load(path, network=...)`. Of several processes all call this, and process 0 writes.

    Raises ValueError if `path` is a file, or holds pairs, draws or a catalog; OSError if the disk is full; what `path` held before is still
    there.
    """
    root = Path(path).absolute()
    check_place(root)
    if processes.is_first():
        _write(root, posterior)
    processes.wait_for_all()


def _write(root: Path, posterior: Posterior) -> None:
    with full_disk_says(root, "free some space and save again; what was there before is kept"):
        (root / WEIGHTS).mkdir(parents=True, exist_ok=True)
        spec = make_spec(posterior)
        digest = spec["weights_sha256"][:12]
        names = itertools.chain([digest], (f"{digest}-{n}" for n in itertools.count(1)))
        name = next(name for name in names if not (root / WEIGHTS / name).exists())
        with _checkpointer() as checkpointer:
            checkpointer.save(root / WEIGHTS / name, jax.device_get(nnx.to_pure_dict(posterior.weights.params)))
        write_json(root / SPEC, {**spec, "weights": name})
    for old in (root / WEIGHTS).iterdir():
        if old.name != name:
            shutil.rmtree(old, ignore_errors=True)


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """spec.json of a run directory.

    Raises ValueError if there is none, if it is damaged, or if its format is newer than this version of distsbi reads.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(
            f"{root} is no run directory: no such folder. Train first, or give the path that was saved to."
        )
    if not (root / SPEC).is_file():
        started = (root / "checkpoints").is_dir()
        reason = (
            "its training has not finished; run the same training again to resume it"
            if started
            else "it has no spec.json"
            + (f"; pairs are trained on with distsbi train --data {root}" if any(root.glob("*.parquet")) else "")
        )
        raise ValueError(f"{root} is no finished run: {reason}.")
    try:
        spec = json.loads((root / SPEC).read_text())
        found = spec["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{root / SPEC} is damaged ({type(error).__name__}); restore it from a copy, or train again."
        ) from error
    if not isinstance(found, int) or found > FORMAT:
        raise ValueError(f"{root} has run format {found}; this distsbi reads up to {FORMAT}. Update distsbi.")
    if found < OLDEST or (found < FORMAT and set(KINDS) & set(spec.get("facts", ()))):
        raise ValueError(
            f"{root} has run format {found} of an earlier distsbi; this one does not read it. Train again."
        )
    missing = [name for name in REQUIRED if name not in spec]
    if missing:
        raise ValueError(f"{root / SPEC} is damaged: it has no {missing[0]}; restore it from a copy, or train again.")
    return spec


def instruments(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """The parts that an observation of this run is made of, None where it is one array. Raises ValueError as `read_spec` does."""
    if not (Path(path) / SPEC).is_file():
        return None
    names = read_spec(path)["network"].get("embedded", {}).get("layout", {}).get("names", [""])
    return None if names == [""] else tuple(names)


def load(
    path: str | os.PathLike[str],
    *,
    mesh: meshes.MeshLike = None,
    network: Any = None,
) -> Posterior:
    """The posterior of a run directory, on any mesh.

    `network`: for a run of a user's own module (a network, or an embedding net; a dict of those where several are), the module, a function
    that makes it, or "package.module:function"; its weights are replaced. Nothing else that a run names is imported or run.

    Raises ValueError for a missing, unfinished, damaged or newer run directory.
    """
    root = Path(path).absolute()
    spec = read_spec(root)
    try:
        module = _rebuild(spec, network)
        names, facts, digest = tuple(spec["parameter_names"]), spec["facts"], spec["weights_sha256"]
        folder = root / WEIGHTS / Path(spec["weights"]).name
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{root / SPEC} is damaged: {error!r}; restore it from a copy, or train again.") from error
    try:
        method = make_method(spec["method"]["name"], **spec["method"]["params"])
        standardizer = Standardizer.from_dict(spec["standardizer"])
        solver = solver_from_dict(spec["solver"])
        tile = {kind: Tile(**shape) for kind, shape in spec["tile"].items()}
    except Exception as error:
        raise ValueError(f"{root / SPEC} is damaged: {error!r}; restore it from a copy, or train again.") from error
    graphdef, state = nnx.split(module)
    target = meshes.make_mesh(mesh)
    shaped = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.replicated(target)),
        nnx.to_pure_dict(state),
    )
    try:
        with _checkpointer() as checkpointer:
            weights = checkpointer.restore(folder, shaped)
    except Exception as error:
        raise ValueError(
            f"{folder} is missing or damaged ({error}); restore it from a copy, or train again."
        ) from error
    nnx.replace_by_pure_dict(state, weights)
    if weights_digest(state) != digest:
        raise ValueError(
            f"{folder} does not hold the weights that {SPEC} names; restore it from a copy, or train again."
        )
    merged: Any = nnx.merge(graphdef, state)
    options: dict[str, Any] = {"names": names, "solver": solver, "tile": tile, "mesh": target, "facts": facts}
    kind: dict[str, Any] = {name: name in spec.get("kind", ()) for name in KINDS}
    try:
        if (
            isinstance(merged, Conditional)
            and ALL_FREE not in spec.get("kind", ())
            and len(standardizer.bijection.kinds) == merged.network.num_tokens
        ):
            posterior: Posterior = JointPosterior(merged.network, method, standardizer, merged.dim_theta, **options)
        else:
            posterior = Posterior(merged, method, standardizer, **options, **kind)
        same = fingerprint(model_spec(posterior), digest) == spec["fingerprint"]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{root / SPEC} is damaged: {error!r}; restore it from a copy, or train again.") from error
    if not same:
        raise ValueError(
            f"{root / SPEC} was changed since it was saved: it no longer defines the posterior of its fingerprint; restore it from a copy, "
            f"or train again."
        )
    return posterior


def _rebuild(spec: dict[str, Any], network: Any) -> Any:
    """The module that the weights belong to; a user's own is told the sizes that training gave it."""
    if "embedded" in spec["network"]:
        return _embedded(spec, network)
    inner: Any = _inner(spec, network)
    view, sizes = spec["network"]["view"], spec["sizes"]
    if view is None:
        _set_sizes(inner, *sizes)
        return inner
    if view == "unconditional":
        return Unconditional(inner)
    pattern = spec["network"]["pattern"]
    if spec["network"]["name"] is None:
        inner.num_tokens, inner.ch_theta = sizes[0] + sizes[2], sizes[1]
    return Conditional(inner, tuple(pattern["free"]), tuple(pattern["given"]))


def _embedded(spec: dict[str, Any], given: Any) -> Any:
    """An `Embedded`, of which the network or some of the nets may be a user's own."""
    described, (dim_theta, ch_theta, *_) = spec["network"]["embedded"], spec["sizes"]
    layout, nets = Layout.from_dict(described["layout"]), described["nets"]
    given = _imported(given) if isinstance(given, str) else given
    given = given if given is None or isinstance(given, (nnx.Module, Mapping)) else given()
    if isinstance(given, Embedded):
        return given
    own = [name for name, net in (nets or {}).items() if net is None]
    if own:
        found = dict(given) if isinstance(given, Mapping) else dict.fromkeys(own, given)
        if set(found) != set(own) or None in found.values():
            raise ValueError(
                f"this run holds a user's own embedding net{'s for ' + str(own) if own != [''] else ''}; load it with "
                f"load(path, network=<the net{'s in a dict' if len(own) > 1 else ''}, or what makes it>), or --network package.module:function."
            )
        given = None
    made = None if nets is None else {name: found[name] if net is None else rebuild(net) for name, net in nets.items()}
    inner = _inner(spec, given)
    if spec["network"]["name"] is None:
        _set_sizes(inner, dim_theta, ch_theta, *(layout.packed if made is None else embedded_shape(made, layout)))
    return Embedded(inner, made, layout)


def _set_sizes(module: Any, *sizes: int) -> None:
    for name, value in zip(("dim_theta", "ch_theta", "dim_x", "ch_x"), sizes, strict=True):
        setattr(module, name, value)


def _inner(spec: dict[str, Any], network: Any) -> Any:
    name = spec["network"]["name"]
    if isinstance(network, str):
        network = _imported(network)
    if network is not None:
        return network if isinstance(network, nnx.Module) else network()
    if name is None:
        raise ValueError(
            "this run holds a user's own network; load it with load(path, network=<the module or its factory>), "
            "or --network package.module:function."
        )
    if name not in NETWORKS:
        raise ValueError(
            f"this run needs the network {name!r}, which this version of distsbi does not have; update distsbi."
        )
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["network"]["params"].items()}
    return make_network(name, params)


def _imported(name: str) -> Any:
    """The function that "package.module:function" names. Raises ValueError if there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"network {name!r} cannot be imported ({error}); write package.module:function, importable where it runs."
        ) from error
