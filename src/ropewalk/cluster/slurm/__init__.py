"""A SLURM job around its ranks: its record, its options, and the verdict that puts it back into the queue."""
