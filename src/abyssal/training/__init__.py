"""The training loop, its recipes, optimizers, balancers and metrics."""
