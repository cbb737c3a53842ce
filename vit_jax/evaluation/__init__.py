"""Evaluation: what scores a model, and the evaluators that watch a run."""
