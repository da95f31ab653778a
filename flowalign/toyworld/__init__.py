"""The embedded world: 64 x 64 images of coloured shapes and of signs with words, clips of shapes, and exact judges."""
