"""Saved models in formats that other programs read. Our own checkpoints are in trainer.checkpoints."""
