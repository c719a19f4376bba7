"""The train step, its program, optimizers, and the train loop."""
