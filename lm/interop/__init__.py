"""Weights in and out: checkpoints of our own, and those of others."""
