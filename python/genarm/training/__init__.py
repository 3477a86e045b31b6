"""Training of autoregressive reward models (ARMs)."""

from .arm import ArmTrainer, collate_pairs, preference_loss, response_logps, train_arm

__all__ = ["ArmTrainer", "collate_pairs", "preference_loss", "response_logps", "train_arm"]
