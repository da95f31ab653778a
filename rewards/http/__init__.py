"""Rewards over HTTP: the server, the reward that asks a server, and the format of their messages."""
