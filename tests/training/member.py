"""Run as each process of a training: `member.py RUN COORDINATOR COUNT INDEX [option=value ...]`. Trains into RUN and prints, as JSON, its losses and a
digest of the weights."""

import json
import sys

import numpy as np

import distsbi
from distsbi.training import loop


def main(path: str, coordinator: str, count: str, index: str, *options: str) -> None:
    given = dict(option.split("=") for option in options)
    if int(count) > 1:
        distsbi.initialize(coordinator, int(count), int(index), timeout=60)
    import jax
    from flax import nnx

    from distsbi import MLPFlowPipeline, MLPParams
    from distsbi.data import StreamedPairs, stream
    from distsbi.pipelines import base
    from distsbi.sampling.run import weights_digest
    from distsbi.tasks import get_task

    task = get_task("two_moons")
    pairs = tuple(np.asarray(a) for a in task.pairs(jax.random.key(0), 603))
    data = {"arrays": pairs, "task": task, "batches": [tuple(p[i : i + 67] for p in pairs) for i in range(0, 603, 67)]}
    data["folder"], data["stream"] = given.get("folder"), StreamedPairs(given.get("folder", ""))
    read = []
    read_file = stream.read_file
    stream.read_file = lambda path, *of, group: read.append(f"{path.name}:{group}") or read_file(path, *of, group=group)
    if "seed" in given:
        data["arrays"] = tuple(np.asarray(a) for a in task.pairs(jax.random.key(int(given["seed"])), 603))
    config = {
        "nsteps": int(given.get("nsteps", 120)), "val_every": 15, "save_every": 15, "batch_size": int(given.get("batch_size", 64)),
        "calibrate": False, "early_stopping": False, "checkpoint_dir": path, "fsdp": "fsdp" in given, "show_progress": False,
        "optimizer": given.get("optimizer", "adamw"),
    }  # fmt: skip
    kept = []
    place = loop.rows.place

    def placed(arrays, mesh):
        made = place(arrays, mesh)
        kept.extend(sum(shard.data.shape[0] for shard in array.addressable_shards) for array in made)
        return made

    loop.rows.place = placed
    pipeline = MLPFlowPipeline(
        data[given.get("data", "arrays")],
        None,
        2,
        2,
        params=MLPParams(2, 2, width=32, depth=2),
        training_config=config,
        prior=task.prior,
    )
    trained, inner = [], base.train

    def watched(*given, **more):
        read.clear()  # what scales were fitted on
        made = inner(*given, **more)
        trained.extend(read)
        return made

    base.train = watched
    losses, val_losses = pipeline.train(nnx.Rngs(0))
    weights = pipeline.posterior.weights.params
    first = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(jax.device_get(weights))]
    found = {"losses": losses, "val_losses": val_losses, "digest": weights_digest(weights), "sums": first, "rows": kept}
    found["groups"] = sorted(set(trained))
    found["devices"] = int(pipeline.mesh.devices.size)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
