"""Weights on disk: a run's own checkpoints, pretrained weights, and their transfer to a model."""
