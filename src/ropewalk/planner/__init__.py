"""What a run needs, before it is submitted: memory, time, money, disk. Importing it loads no torch."""

from ropewalk.planner.cost import lead_seconds
from ropewalk.planner.memory import Allowances, Memory, Setting, memory
from ropewalk.planner.plan import Plan, make_plan
from ropewalk.planner.shape import ModelShape, shape_of
from ropewalk.planner.text import print_plan

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
]
