"""The frozen networks that rewards build on, the preprocessing of their images, and the loading of their weights."""
