"""The needs of a run before it is submitted: memory, time, money, disk. Importing it loads no torch."""

from ropewalk.cluster.planner.cost import lead_seconds
from ropewalk.cluster.planner.memory import Allowances, Memory, Setting, memory
from ropewalk.cluster.planner.plan import Plan, make_plan, print_plan, summary
from ropewalk.cluster.planner.shape import ModelShape, shape_of

__all__ = [
    "Allowances",
    "Memory",
    "ModelShape",
    "Plan",
    "Setting",
    "lead_seconds",
    "make_plan",
    "memory",
    "print_plan",
    "shape_of",
    "summary",
]
