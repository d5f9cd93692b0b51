"""Run as a process of its own, to be killed: trains into argv[1] for argv[2] updates and prints a hash of the weights at the end."""

import sys

import jax
import numpy as np
from flax import nnx

from distsbi import MLPFlowPipeline, MLPParams
from distsbi.sampling.run import weights_digest
from distsbi.tasks import get_task


def main(path: str, nsteps: str) -> None:
    task = get_task("two_moons")
    pairs = tuple(np.asarray(a) for a in task.pairs(jax.random.key(0), 600))
    config = {
        "nsteps": int(nsteps), "val_every": 50, "save_every": 50, "batch_size": 64, "calibrate": False,
        "early_stopping": False, "checkpoint_dir": path, "show_progress": False,
    }  # fmt: skip
    params = MLPParams(2, 2, width=32, depth=2)
    pipeline = MLPFlowPipeline(
        pairs, None, 2, 2, params=params, training_config=config, prior=task.prior, mesh={"data": 2}
    )
    pipeline.train(nnx.Rngs(0))
    print(weights_digest(pipeline.posterior.weights.params))


if __name__ == "__main__":
    main(*sys.argv[1:])
