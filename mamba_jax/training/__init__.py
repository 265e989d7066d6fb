"""Training: schedule, optimizer, loss, accumulation, the step and its state, checkpoints."""
