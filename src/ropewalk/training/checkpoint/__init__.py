"""Checkpoints: saving, resuming, starting from another run's, another number of ranks, and which are kept."""
