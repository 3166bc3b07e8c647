"""Adapters for other people's trainers; each imports its trainer only when it is itself imported.

cppo.integrations.trl    completion pruning and contrastive perception in TRL's GRPOTrainer
cppo.integrations.verl   the same in verl, loaded by verl itself
"""
