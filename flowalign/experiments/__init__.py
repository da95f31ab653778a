"""Many runs: comparisons, best-of-N, campaigns, over-optimisation."""
