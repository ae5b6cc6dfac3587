"""Training: the gradient step, the loop around it, and the run directory. Plain torch; no Ray."""
