"""Draws for xarray and ArviZ, which are imported when they are asked for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from distsbi.store.catalog import Catalog, Id

MOST_BYTES = 8 * 2**30  # of all draws of a catalog, that nobody asks for terabytes by leaving ids out


def to_xarray(catalog: "Catalog", ids: "Sequence[Id] | Id | None") -> Any:
    """See `Catalog.to_xarray`."""
    xarray = _package("xarray")
    about = catalog.about
    if ids is None:
        size = 4 * int(np.prod(about["draws_shape"])) * len(catalog)
        if size > MOST_BYTES:
            raise ValueError(
                f"the draws of all {len(catalog):,} rows take {size / 1e9:.0f} GB; give ids=[...], or go through catalog.items()."
            )
        ids = list(catalog)
    if isinstance(ids, (str, bytes, int, np.integer)):
        ids = [ids]
    draws = catalog.draws_of(ids)
    coords = {
        "observation": list(ids),
        "draw": np.arange(0, about["nsamples"], about["thin"]),
        "parameter": about["parameter_names"],
    }
    dims = ["observation", "draw", "parameter"]
    if about["ch_theta"] == 1:
        draws = draws[..., 0]
    else:
        dims.append("channel")
    attributes = {"fingerprint": catalog.fingerprint, "run": catalog.run["about"].get("run", "")}
    return xarray.DataArray(draws, coords, dims, "draws", attributes)


def to_inference_data(catalog: "Catalog", id: "Id") -> Any:
    """See `Catalog.to_inference_data`."""
    arviz, xarray = _package("arviz"), _package("xarray")
    about, draws = catalog.about, catalog.draws(id)[None]
    dims = ("chain", "draw")
    variables = {
        name: (dims, draws[:, :, i, 0]) if about["ch_theta"] == 1 else ((*dims, "channel"), draws[:, :, i])
        for i, name in enumerate(about["parameter_names"])
    }
    coords = {"chain": [0], "draw": np.arange(0, about["nsamples"], about["thin"])}
    posterior = xarray.Dataset(variables, coords, {"id": str(id), "fingerprint": catalog.fingerprint})
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(posterior=posterior)
    return xarray.DataTree.from_dict({"posterior": posterior})  # what ArviZ takes since version 1


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: pip install 'distsbi[xarray]'") from error
