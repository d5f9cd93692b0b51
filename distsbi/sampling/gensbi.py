"""Models trained with GenSBI, drawn from here."""

import os
from typing import Any

from flax import nnx

from distsbi import mesh as meshes
from distsbi.data.standardise import Standardizer
from distsbi.methods import EDM, FlowMatching
from distsbi.networks import NETWORKS, JointNetwork
from distsbi.networks.gensbi import from_gensbi, read_safetensors
from distsbi.sampling.joint import JointPosterior
from distsbi.sampling.posterior import Posterior

METHODS = {"flow": FlowMatching(scale_input=False), "diffusion": EDM(), "edm": EDM()}


def import_gensbi(
    path: str | os.PathLike[str],
    params: Any,
    *,
    dim_obs: int | None = None,
    method: str | EDM = "flow",
    names: tuple[str, ...] | None = None,
    mesh: meshes.MeshLike = None,
) -> Posterior:
    """The posterior of a model that GenSBI trained, from the file that its `export_safetensors` wrote (0.5.1).

    GenSBI leaves scales to its user, so theta and x are on the scale that the model was trained on.

    Args:
        path: the .safetensors file.
        params: the model's size, `Flux1Params`, `Flux1JointParams` or `SimformerParams`, with GenSBI's values; `conditioning` is
            taken as "joint", GenSBI's.
        dim_obs: for a joint model, how many of its tokens are parameters.
        method: "flow" or "diffusion" (EDM), as it was trained; `distsbi.methods.EDM(sigma_min=..., sigma_max=...)` where these are not
            0.002 and 80.
        names: parameter names.
        mesh: see `distsbi.mesh.make_mesh`.

    Raises ValueError if the file is damaged or holds other parameters than `params` asks for, naming them, and for `names` of another number than
    there are parameters.
    """
    path_of = method if isinstance(method, EDM) else METHODS.get(method)
    if path_of is None:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, or an EDM(...) of distsbi.methods; got {method!r}."
        )
    make = next(
        (make for made_of, make in NETWORKS.values() if type(params) is made_of and hasattr(params, "conditioning")),
        None,
    )
    if make is None:
        raise ValueError(
            f"params must be Flux1Params, Flux1JointParams or SimformerParams of distsbi; got {type(params).__name__}."
        )
    fields = {**params.to_dict(), "conditioning": "joint"}
    network = from_gensbi(make(type(params).from_dict(fields), nnx.Rngs(0)), read_safetensors(path))
    facts = {"imported": {"from": "GenSBI", "file": os.path.basename(os.fspath(path))}}
    options: dict[str, Any] = {"names": names, "mesh": mesh, "facts": facts}
    if isinstance(network, JointNetwork):
        if dim_obs is None:
            raise ValueError("dim_obs is missing: how many of the model's tokens are parameters.")
        scales = Standardizer.identity(network.num_tokens, 0, network.ch_theta, network.ch_theta)
        return JointPosterior(network, path_of, scales, dim_obs, **options)
    if dim_obs is not None and dim_obs != network.dim_theta:
        raise ValueError(
            f"dim_obs is of joint models; this one has {network.dim_theta} parameters by its params: leave out dim_obs={dim_obs}."
        )
    scales = Standardizer.identity(network.dim_theta, network.dim_x, network.ch_theta, network.ch_x)
    return Posterior(network, path_of, scales, **options)
