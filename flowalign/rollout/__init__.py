"""From prompts to generated samples: rollouts, and stores of scored groups."""
