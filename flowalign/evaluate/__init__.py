"""Evaluation: how good a model is, and what a run changed."""
