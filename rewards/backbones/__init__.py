"""Frozen networks that rewards build on, how pictures are prepared for them, and where their weights come from."""
