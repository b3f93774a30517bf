"""Verification of exports: a static part, and engines in processes that cannot import ropewalk."""
