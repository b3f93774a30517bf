"""The format of packed stores on disk."""
