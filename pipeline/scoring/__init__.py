"""Scores: of pixels ahead of training, and by a model in training."""
