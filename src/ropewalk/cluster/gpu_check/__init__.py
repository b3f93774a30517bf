"""The GPU check: everything that one GPU can prove in eight minutes, and several together: ``scripts/gpu_check.py``."""
