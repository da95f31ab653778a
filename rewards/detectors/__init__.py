"""Detectors of objects, colours and text in images."""
