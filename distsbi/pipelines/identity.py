"""What a resumed training must share with the one that began: a killed run goes on only as the same network, on the same data."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from distsbi.data.source import FRACTION, Pairs
from distsbi.data.standardise import Standardizer
from distsbi.methods import Method
from distsbi.networks import Embedded, network_name
from distsbi.training import TrainingConfig
from distsbi.training.update import Pose

FREE = ("show_progress", "checkpoint_dir", "calibrate")  # options that may differ


def training_identity(
    model: Any,
    method: Method,
    config: TrainingConfig,
    pose: Pose,
    data: str,
    validation: Pairs,
    standardizer: Standardizer,
) -> dict[str, Any]:
    """Plain values that are equal for the same training. `data`: the fingerprint of the training set."""
    options = config.to_dict()
    options["val_fraction"] = (
        FRACTION if config.val_fraction is None else config.val_fraction
    )  # the pairs themselves are in "validation"
    return {
        "network": _network(model),
        "method": [type(method).__name__, method.to_dict()],
        "config": {name: value for name, value in options.items() if name not in FREE},
        "pose": repr(pose) if dataclasses.is_dataclass(pose) else "conditional",
        "data": data,
        "validation": _digest(validation),
        "standardizer": hashlib.sha256(json.dumps(standardizer.to_dict(), sort_keys=True).encode()).hexdigest(),
    }


def _network(model: Any) -> list[Any]:
    if isinstance(model, Embedded):
        return ["Embedded", model.params.to_dict(), *_network(model.network)]
    name = network_name(model)
    return [name, model.params.to_dict() if name else type(model).__name__]


def _digest(arrays: Pairs) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
