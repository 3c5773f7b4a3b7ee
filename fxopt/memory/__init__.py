"""Where activations lie: plans for one arena that many buffers share. Whole numbers only, no tensors."""

from fxopt.memory.checker import verify
from fxopt.memory.document import from_dict, to_dict
from fxopt.memory.errors import PlanError
from fxopt.memory.minimalloc import read_csv, write_csv
from fxopt.memory.order import Order
from fxopt.memory.picture import draw, draw_beside
from fxopt.memory.planner import SOLVERS, Plan, plan
from fxopt.memory.problem import Buffer, Problem
from fxopt.memory.sets import MemoryPlan, plan_sets, plan_symbolic
from fxopt.memory.symbolic import Layout, SymbolicBuffer, SymbolicPlan, SymbolicProblem
from fxopt.memory.yaml_text import read_yaml, write_yaml

__all__ = [
    "SOLVERS",
    "Buffer",
    "Layout",
    "MemoryPlan",
    "Order",
    "Plan",
    "PlanError",
    "Problem",
    "SymbolicBuffer",
    "SymbolicPlan",
    "SymbolicProblem",
    "draw",
    "draw_beside",
    "from_dict",
    "plan",
    "plan_sets",
    "plan_symbolic",
    "read_csv",
    "read_yaml",
    "to_dict",
    "verify",
    "write_csv",
    "write_yaml",
]
