"""Whether our networks are GenSBI's, on fresh random numbers. See benchmarks/README.md.

    python benchmarks/gensbi_numbers.py --python python3.12
    python benchmarks/gensbi_numbers.py --python python3.12 --seed 0 --write

GenSBI 0.5.1 is installed into an environment of its own, .cache/gensbi, by a Python of 3.12 or newer; there it makes small networks with random weights,
and their velocities at random inputs, in float32 at the highest precision of products. Here the same weights are read, and the largest difference of our
velocities over the largest velocity is printed, one JSON line a case, and appended to benchmarks/results/gensbi.jsonl. Exits with an error where one is
above 1e-5. `--write`: what GenSBI made becomes the fixture that the tests read.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, append, provenance

VERSION, BOUND = "0.5.1", 1e-5
ENVIRONMENT = HERE.parent / ".cache" / "gensbi"
FIXTURES = HERE.parent / "tests" / "networks" / "fixtures"
FILES = {"gensbi_flux1.npz": "make_gensbi_flux1.py", "gensbi_exports.npz": "make_gensbi_exports.py"}
GRIDS = {"rope2d": {"obs_grid": (3, 1)}}  # of two-dimensional ids, which GenSBI is told beside its parameters


def install(python: str) -> Path:
    """The interpreter of GenSBI's environment, made where there is none."""
    interpreter = ENVIRONMENT / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(ENVIRONMENT)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", f"gensbi=={VERSION}"], check=True)
    return interpreter


def cases(file: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    with np.load(file) as content:
        for name in dict.fromkeys(key.partition("/")[0] for key in content.files):
            yield name, {k.partition("/")[2]: content[k] for k in content.files if k.partition("/")[0] == name}


def our_network(name: str, made: dict[str, np.ndarray], folder: Path) -> Any:
    """The network of p(theta | x) with GenSBI's weights."""
    from flax import nnx

    from distsbi import Flux1JointParams, Flux1Params, SimformerParams, import_gensbi
    from distsbi.networks import Flux1
    from distsbi.networks.gensbi import from_gensbi

    fields = json.loads(str(made["params"]))
    if "safetensors" not in made:
        params = Flux1Params.from_dict(fields | {"conditioning": "joint"} | GRIDS.get(name, {}))
        return from_gensbi(nnx.eval_shape(lambda: Flux1(params)), _tree(made))
    path = folder / "weights.safetensors"
    path.write_bytes(made["safetensors"].tobytes())
    kinds = {"Flux1": Flux1Params, "Flux1Joint": Flux1JointParams, "Simformer": SimformerParams}
    params = kinds[fields.pop("class")].from_dict(fields)
    return import_gensbi(path, params, dim_obs=None if isinstance(params, Flux1Params) else 2).network


def _tree(made: dict[str, np.ndarray]) -> dict[tuple[Any, ...], np.ndarray]:
    tree, start = {}, 0
    for line in made["paths"]:
        path, sizes = str(line).split(" ")
        shape = tuple(map(int, sizes.split(",")))
        part = made["weights"][start : start + int(np.prod(shape))]
        tree[tuple(int(word) if word.isdigit() else word for word in path.split("/"))] = (part / 256).reshape(shape)
        start += part.size
    return tree


def difference(network: Any, made: dict[str, np.ndarray]) -> float:
    """The largest difference of velocities, in units of the largest velocity."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    theta, x = (made["theta"], made["x"]) if "theta" in made else (made["values"][:, :2], made["values"][:, 2:])
    with jax.default_matmul_precision("highest"):
        call = nnx.jit(lambda n, t, y, x: n(t, y, n.encode(x)))
        ours = call(network, jnp.asarray(made["t"]), jnp.asarray(theta)[:, None], jnp.asarray(x))[:, 0]
    theirs = made["velocity"][:, : theta.shape[1]]
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12", help="what makes GenSBI's environment: 3.12 or newer")
    parser.add_argument("--seed", type=int, default=1, help="of weights and inputs (default: 1; the fixture's is 0)")
    parser.add_argument("--write", action="store_true", help="make these the tests' fixture")
    arguments = parser.parse_args()
    interpreter, worst = install(arguments.python), 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, script in FILES.items():
            subprocess.run([str(interpreter), HERE / script, folder / file, str(arguments.seed)], check=True)
            for case, made in cases(folder / file):
                found = difference(our_network(case, made, folder), made)
                worst = max(worst, found)
                line: dict[str, Any] = {
                    "case": f"{file.removesuffix('.npz')}/{case}",
                    "seed": arguments.seed,
                    "gensbi": VERSION,
                }
                line["largest_relative_difference"] = found
                print(json.dumps(line), flush=True)
                append(HERE / "results" / "gensbi.jsonl", line | provenance())
            if arguments.write:
                shutil.copy(folder / file, FIXTURES / file)
    if worst > BOUND:
        sys.exit(f"the largest relative difference is {worst:.2g}, above {BOUND}")


if __name__ == "__main__":
    main()
