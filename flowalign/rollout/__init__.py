"""From prompts to generated samples: rollouts, and datasets of scored groups."""
