"""Noise between training seeds: its statistics, the floor of each metric, and decisions declared before the runs."""
