"""A run: from options to a run folder, and back from a checkpoint to a module."""
