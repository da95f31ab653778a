"""Vision-language models as judges: of one's own or behind a server, and how their answers are read."""
