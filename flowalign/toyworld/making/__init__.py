"""Make the embedded world's judges from nothing: a vision transformer, a CLIP on it, a taste and a preference.

The vision transformer learns what covers each patch, what is in the picture, and what does not belong there; a CLIP's
image tower starts from it and learns, contrastively (Radford et al., 2021, fig. 3), which prompt a picture was drawn
from; the preference is that CLIP tuned on choices between two pictures (PickScore: Kirstain et al., 2023). Prompts that
are held out from training a policy are held out here too. A step's batch depends on (seed, stage, step) alone.
"""
