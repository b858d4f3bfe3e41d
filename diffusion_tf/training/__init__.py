"""Training (Algorithm 1): the step, the optimizer, the state, the loop around them, and its reports."""
