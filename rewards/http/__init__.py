"""Rewards over HTTP: the server, the reward that asks one, and what passes between them."""
