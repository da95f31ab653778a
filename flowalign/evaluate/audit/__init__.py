"""Whether a reward was cheated: held-out rewards, image statistics and distances, within the base model's bands."""
