"""The arithmetic of a format, written into a graph, and found there again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxopt.program import Program
from fxopt.views import upstream
from fxopt.weight_formats import CodedWeight


@dataclass(frozen=True)
class Written:
    """Writes down the calls of operators, where nodes are being inserted."""

    program: Program

    def __call__(self, operator: Any, *arguments: Any) -> Node:
        return self.program.graph.call_function(operator, arguments)

    def constant(self, name: str, value: Tensor) -> Node:
        if not hasattr(self.program.gm, name):
            self.program.gm.register_buffer(name, value)
        return self.program.graph.get_attr(name)


def coded_weight(program: Program, weight: Node) -> CodedWeight | None:
    """The codes that a weight is computed from in the graph, if it is."""
    by_name = {one.parts[0]: one for one in program.facts.weights}
    found = upstream(weight, frozenset(by_name))
    return by_name[str(found.pop().target)] if len(found) == 1 else None
