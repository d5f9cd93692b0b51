"""Export sbibm's observations and reference posterior samples to benchmarks/.references/<task>.npz.

sbibm-jax ships them with its package (MIT licence, 30 MB) but needs Python >= 3.12, while distsbi runs from 3.11. So
this one script runs in an environment of its own, and everything else reads its files:

    python3.12 -m venv .cache/sbibm && .cache/sbibm/bin/pip install sbibm-jax
    .cache/sbibm/bin/python benchmarks/export_references.py

Each file holds `observations` [10, dim_x], `true_parameters` [10, dim_theta] and `samples` [10, 10000, dim_theta],
float32, and `source`, the package version; that of bernoulli_glm_raw, which is no task of distsbi's, also what simulates it: `design_matrix`
[100, 10] and the prior's `precision_matrix` [10, 10].
"""

import argparse
import importlib.metadata
from pathlib import Path

import numpy as np

TASKS = ("two_moons", "gaussian_linear", "slcp", "bernoulli_glm_raw")
FOLDER = Path(__file__).parent / ".references"


def export(name: str, folder: Path) -> Path:
    from sbibm_jax import get_task  # pyright: ignore[reportMissingImports]

    task = get_task(name)
    numbers = range(1, task.num_observations + 1)
    folder.mkdir(parents=True, exist_ok=True)
    more = {}
    if name == "bernoulli_glm_raw":
        more["design_matrix"] = np.asarray(task._load_design_matrix(), np.float32)
        more["precision_matrix"] = np.asarray(task.prior_params["precision_matrix"], np.float32)
    path = folder / f"{name}.npz"
    np.savez_compressed(
        path,
        observations=np.concatenate([np.asarray(task.get_observation(i), np.float32) for i in numbers]),
        true_parameters=np.concatenate([np.asarray(task.get_true_parameters(i), np.float32) for i in numbers]),
        samples=np.stack([np.asarray(task.get_reference_posterior_samples(i), np.float32) for i in numbers]),
        source=f"sbibm-jax {importlib.metadata.version('sbibm-jax')}",
        **more,
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=TASKS, help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    for name in arguments.tasks:
        path = export(name, arguments.folder)
        with np.load(path) as file:
            print(
                f"{path}: samples {file['samples'].shape}, observations {file['observations'].shape}, "
                f"{path.stat().st_size / 1e6:.1f} MB"
            )


if __name__ == "__main__":
    main()
