"""What a SLURM job does around the ranks: its record, its options, and whether it goes back into the queue."""
