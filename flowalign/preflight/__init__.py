"""Checks before a run: its plan, whether a model fits, how long a step takes, what this machine can do."""
