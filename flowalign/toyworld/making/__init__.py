"""Trains the embedded world's model and judges from nothing: vision transformer, CLIP, aesthetic head and preference.

The vision transformer learns what covers each patch, what the image shows, and what does not belong there. The CLIP's
image tower starts from it and learns contrastively (Radford et al., 2021, fig. 3) from which prompt an image was drawn.
The preference is this CLIP, tuned on choices between two images (PickScore: Kirstain et al., 2023). Prompts that are
held out from a policy's training are held out here too. A step's batch depends on (seed, stage, step) alone.
"""
