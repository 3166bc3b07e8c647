"""The thin trainer, its flow (rewards to gradients), checkpoints and logs."""
