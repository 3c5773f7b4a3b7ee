"""Whether what a trace took for true of its sizes is true of all sizes.

A trace follows one way through a model's code. Where the way depends on sizes, PyTorch shows that all of them lead
there or gives up, and not all of its versions can show that 16 n is no more than 64 n. It can note such comparisons
in the graph instead, as assertions; here sympy shows them, which knows that sizes are positive.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from sympy.core.relational import Relational
from torch.fx import Graph, Node
from torch.utils._sympy import functions

aten = torch.ops.aten


def unproven(graph: Graph, known: Mapping[sympy.Symbol, sympy.Expr]) -> str | None:
    """The first assertion about sizes that does not hold for all of them. ``known`` says what some of them are."""
    for node in graph.nodes:
        if node.target is aten._assert_scalar.default:
            condition = node.args[0]
            claim = condition.meta.get("val", condition) if isinstance(condition, Node) else condition
            if not _always(claim, known):
                return str(claim)
    return None


def _always(claim: object, known: Mapping[sympy.Symbol, sympy.Expr]) -> bool:
    if not isinstance(claim, torch.SymBool):
        return claim is True
    relation = sympy.sympify(claim.node.expr).subs(known)
    positive = {one: sympy.Symbol(one.name, integer=True, positive=True) for one in relation.free_symbols}
    relation = relation.xreplace(positive).replace(functions.Min, sympy.Min).replace(functions.Max, sympy.Max)
    return bool(relation.replace(lambda part: isinstance(part, Relational), _beside_zero) == sympy.true)


def _beside_zero(relation: Relational) -> sympy.Basic:
    """The same about the difference, whose terms cancel out."""
    return relation.func(sympy.expand(relation.lhs - relation.rhs), 0)
