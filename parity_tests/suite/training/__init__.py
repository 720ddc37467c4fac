"""Losses, metrics, uncertainty, optimizers and training."""
