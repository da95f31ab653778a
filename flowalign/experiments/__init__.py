"""Experiments of many runs: comparisons, best-of-N, campaigns, over-optimisation."""
