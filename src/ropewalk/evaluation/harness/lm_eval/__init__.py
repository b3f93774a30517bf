"""lm-eval as a harness: its tasks, our model."""
