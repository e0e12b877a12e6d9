"""One step of the method: reference, training, checkpoints, guards, merging."""
