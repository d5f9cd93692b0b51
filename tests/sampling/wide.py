"""Random numbers, a short training, its draws and densities, and a student of it. Run as a process of its own it writes them to a file: with
JAX_ENABLE_X64 they are what they are without."""

import sys

import jax
import numpy as np
from flax import nnx

from distsbi import MLPFlowPipeline, MLPParams, keys
from distsbi.methods import METHODS
from distsbi.sampling import DistillConfig, train_student
from distsbi.training.update import ConditionMasks


def numbers() -> dict[str, np.ndarray]:
    key, rng = keys.as_key(5), np.random.default_rng(0)
    found = {name: method().draw_times(key, (9,)) for name, method in METHODS.items()}
    found["masks"] = ConditionMasks().draw(key, 50, 2, 3)
    theta = rng.normal(size=(500, 2, 1))
    pairs = theta, theta + 0.3 * rng.normal(size=theta.shape)
    pipeline = MLPFlowPipeline(
        pairs, None, 2, 2, params=MLPParams(2, 2, width=16, depth=1), mesh={"data": 1},
        training_config={"nsteps": 10, "batch_size": 64, "calibrate": False, "show_progress": False},
    )  # fmt: skip
    pipeline.train(nnx.Rngs(0))
    x = np.full((1, 2, 1), 0.3, np.float32)
    config = DistillConfig(1, nsteps=3, batch_size=8, teacher_steps=2, show_progress=False)
    student, losses = train_student(pipeline.posterior, x, config)
    draws = pipeline.sample(rng=0, x_o=x, nsamples=20, steps=4)
    found |= {
        "draws": draws,
        "noisy": pipeline.sample(rng=0, x_o=x, nsamples=20, solver="euler_maruyama", steps=4),
        "density": pipeline.log_prob(draws, x, steps=4),
        "estimate": pipeline.log_prob(draws, x, steps=4, divergence="hutchinson", probes=2),
        "student": student.sample(0, x, 20),
        "losses": np.asarray(losses, np.float32),
    }
    weights = jax.tree.leaves((pipeline.posterior.weights.params, student.weights.params))
    found |= {f"weights {i}": leaf for i, leaf in enumerate(weights)}
    return {name: np.asarray(value) for name, value in found.items()}


if __name__ == "__main__":
    np.savez(sys.argv[1], **numbers())  # type: ignore[arg-type]
