"""Audits: whether held-out rewards, image statistics and distances stay in the base model's bands or show hacking."""
