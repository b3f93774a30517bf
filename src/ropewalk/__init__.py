"""Long-context continued pretraining of RoPE language models."""
