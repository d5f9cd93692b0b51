"""Run as a process of its own: prints a hash of the draws that every placement must share."""

import dataclasses
import hashlib
import sys

import numpy as np
from flax import nnx

from distsbi.networks import Flux1, Flux1Params
from distsbi.sampling import Tile
from tests.gaussian import random_mlp_posterior

FLUX = dataclasses.replace(Flux1Params.default(2, 3), depth=1, depth_single_blocks=1)


def main(case: str) -> None:
    rng = np.random.default_rng(4)
    xs, ids = rng.normal(size=(13, 3, 1)).astype("f4"), rng.integers(0, 2**63, 13, dtype=np.uint64)
    out = np.empty((13, 150, 2, 1), np.float32)
    network = Flux1(FLUX, rngs=nnx.Rngs(0)) if case.startswith("flux") else None
    posterior = random_mlp_posterior("auto", tile=Tile(8, 64), network=network)
    order = np.arange(13)
    if "reversed" in case:
        order = order[::-1]
    size = 4 if "shards" in case else 13
    for first in range(0, 13, size):
        rows = order[first : first + size]
        out[rows] = posterior.draw(11, xs[rows], 150, observation_ids=ids[rows])
    print(hashlib.sha256(out.tobytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
