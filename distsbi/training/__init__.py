"""Training on a mesh: state, update, loop, checkpoints."""

from distsbi.training.config import TrainingConfig
from distsbi.training.loop import Trained, train
from distsbi.training.update import ConditionMasks

__all__ = ["ConditionMasks", "Trained", "TrainingConfig", "train"]
