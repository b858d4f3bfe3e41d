"""Training (Algorithm 1): the step, the optimizer, the loop around them and what it reports."""
