"""The HTML report that compares runs."""

from ropewalk.report.page import compare

__all__ = ["compare"]
