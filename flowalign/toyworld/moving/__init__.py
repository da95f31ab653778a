"""The embedded moving world: clips of the still world's shapes in motion, with prompts and an exact judge."""
