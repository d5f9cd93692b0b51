"""Training on a mesh: state, update, loop, checkpoints."""

from distsbi.training.config import TrainingConfig
from distsbi.training.loop import Trained, train

__all__ = ["Trained", "TrainingConfig", "train"]
