"""From a training step to its batches."""
