"""One stage, done once: the store, worker processes, progress."""
