"""The embedded world: 64 x 64 pictures of coloured shapes and of signs with words, judged exactly."""
