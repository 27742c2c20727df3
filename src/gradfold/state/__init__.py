"""State: what a window saves and puts back, from gradients to random states."""
