"""Completion pruning and contrastive perception for RL finetuning."""

__version__ = "0.1.0"
