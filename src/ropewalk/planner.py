"""The planner, under its documented name; it lives in :mod:`ropewalk.cluster.planner`."""

from ropewalk.cluster.planner import *  # noqa: F403
from ropewalk.cluster.planner import __all__  # noqa: F401
