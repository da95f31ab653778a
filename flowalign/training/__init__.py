"""The parts of the training loop: the learner, processes, checkpoints, the self-test, the display."""
