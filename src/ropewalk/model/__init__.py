"""Stock transformers models made ready for training."""
