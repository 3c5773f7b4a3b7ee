"""Logits only for the positions that are asked for.

    logits = linear(hidden, W)      becomes      logits = linear(index_select(hidden, 1, logit_positions), W)

The vocabulary projection is the largest matmul of the model, and generation reads one row of
its result. What stands behind it (soft-caps, scales, casts) is elementwise and follows along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.program import INPUT_IDS, LOGIT_POSITIONS, Program
from fxopt.rewrite import Pass
from fxopt.symbols import fresh_size
from fxopt.views import Linear, is_tensor, shape

aten = torch.ops.aten
#: What models do to logits one number at a time.
ELEMENTWISE = frozenset({aten.div.Tensor, aten.mul.Tensor, aten.tanh.default, aten.to.dtype, aten._to_copy.default})


@dataclass(frozen=True)
class Head:
    """``node``: the vocabulary projection, ``logits`` computed from it elementwise."""

    node: Node
    linear: Linear | None


@dataclass(frozen=True)
class LastLogits(Pass[Head]):
    name = "last_logits"
    summary = "computes logits only for the positions asked for"

    def expected(self, program: Program) -> int:
        return 1

    def find(self, program: Program) -> Iterator[Head]:
        if program.has_input(LOGIT_POSITIONS):  # done before
            return
        node = program.logits()
        while node.target in ELEMENTWISE and isinstance(node.args[0], Node) and _by_one_number(node):
            node = node.args[0]
        yield Head(node, Linear.of(node))

    def refuse(self, program: Program, site: Head) -> str | None:
        if site.linear is None:
            return (
                f"the logits are computed by {site.node.target}, not by a linear layer with elementwise ops behind it"
            )
        if len(shape(site.linear.x)) != 3:
            return f"{site.node} reads an input of {len(shape(site.linear.x))} dimensions, not [batch, step, hidden]"
        return None

    def rewrite(self, program: Program, site: Head) -> None:
        assert site.linear is not None
        count = fresh_size(program.shape_env, "logit_count", hint=2)
        with program.fake_mode:
            positions = torch.empty(count, dtype=torch.long, device=program.facts.device)
        asked = program.add_input(LOGIT_POSITIONS, positions, after=program.placeholders()[INPUT_IDS])
        with program.graph.inserting_before(site.node):
            picked = program.graph.call_function(aten.index_select.default, (site.linear.x, 1, asked))
            logits = program.graph.call_function(aten.linear.default, (picked, *site.node.args[1:]), site.node.kwargs)
        site.node.replace_all_uses_with(logits)
        program.graph.erase_node(site.node)


def _by_one_number(node: Node) -> bool:
    """Whether an elementwise op treats every position alike."""
    others = [operand for operand in node.all_input_nodes if operand is not node.args[0]]
    return all(math.prod(shape(operand)) == 1 for operand in others if is_tensor(operand))
