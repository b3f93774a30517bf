"""Dashboards: evaluations in the tracker's runs, and the W&B workspace and report that show them."""

from ropewalk.report.dashboard.build import dashboard
from ropewalk.report.dashboard.tracked import track

__all__ = ["dashboard", "track"]
