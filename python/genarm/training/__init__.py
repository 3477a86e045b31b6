"""Training of autoregressive reward models (ARMs)."""

from .arm import train_arm
from .objective import ArmTrainer, collate_pairs, preference_loss, response_logps

__all__ = ["ArmTrainer", "collate_pairs", "preference_loss", "response_logps", "train_arm"]
