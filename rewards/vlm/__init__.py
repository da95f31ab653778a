"""Vision-language models as judges: local models, models behind a server, and the reading of their answers."""
