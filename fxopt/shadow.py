"""The same run twice, in the arena and with memory for every tensor, compared after each op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxopt.arena import ArenaModule
from fxopt.out_variants import EMPTY


@dataclass(frozen=True)
class Difference:
    """An op whose result in the arena is not what it is with memory of its own."""

    node: str
    op: str
    elements: int  # that differ


@dataclass(frozen=True)
class Replay:
    """What a shadow replay found. ``results`` are those of the run in the arena."""

    compared: int
    differences: tuple[Difference, ...]
    results: Any


def shadow_replay(module: ArenaModule, inputs: Sequence[Any]) -> Replay:
    """Run a module beside a copy of itself in debug mode, which gets clones of the inputs.

    The first difference names the op at which something went wrong; those behind it follow from it.
    """
    shadow = ArenaModule(module.graph_module, module.plan, "debug")
    clones = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    compared, differences = 0, []
    with module.arena.lock, torch.no_grad():
        fast, slow = _Run(module, inputs), _Run(shadow, clones)
        for (node, value), (_, wanted) in zip(fast, slow, strict=True):
            if node.target in EMPTY:
                continue
            compared += 1
            if elements := _differing(value, wanted):
                differences.append(Difference(node.name, str(node.target), elements))
    return Replay(compared, tuple(differences), fast.results)


class _Run:
    """The ops of one run with their results; at the end, what the graph returns."""

    def __init__(self, module: ArenaModule, inputs: Sequence[Any]) -> None:
        self._steps = module.steps(inputs)
        self.results: Any = None

    def __iter__(self) -> Iterator[tuple[Node, Any]]:
        self.results = yield from self._steps


def _differing(value: Any, wanted: Any) -> int:
    """Elements that are not the same to the last bit; NaN is as NaN."""
    count = 0
    for one, other in zip(pytree.tree_leaves(value), pytree.tree_leaves(wanted), strict=True):
        if isinstance(one, Tensor):
            same = (one == other) | ((one != one) & (other != other))
            count += int(same.numel() - same.sum())
        else:
            count += one != other
    return count
