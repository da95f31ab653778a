"""How good a model is, and what a run did to it."""
