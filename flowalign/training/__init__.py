"""What the loop is made of: the learner, processes, checkpoints, the self-test, what a person sees."""
