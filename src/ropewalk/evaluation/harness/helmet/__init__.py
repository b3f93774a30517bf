"""HELMET (arXiv 2410.02694) from a checkout of the user's: its YAML written, its eval.py run, its scores collected."""
