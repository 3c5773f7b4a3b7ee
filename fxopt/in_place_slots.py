"""Results that may be written over an operand that nobody reads again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from fxopt.liveness import Leaf, Liveness, Storage
from fxopt.views import mutates

aten = torch.ops.aten

#: Ops that read each row before they write it, beside those that work element by element.
_ROW_BY_ROW = frozenset({aten._softmax.default, aten.softmax.int})


def in_place(gm: GraphModule, live: Liveness) -> Liveness:
    """The same with every result that can take an operand's place in it.

    It may if the op works element by element, if the operand's memory is the arena's, is read here
    for the last time and looks exactly like the result, and if no other operand lies in it otherwise.
    """
    made = {s.node: s for s in live.storages.values() if s.kind == "activation" and s.device == live.device}
    taken: dict[str, str] = {}
    for node in gm.graph.nodes:
        if (storage := made.get(node.name)) is not None and (dying := _dying_twin(node, storage, live)) is not None:
            taken[storage.name] = dying
    return replace(live, in_place=taken)


def in_all(lives: Sequence[Liveness]) -> list[Liveness]:
    """The same with that alone in place which is so at every one of these shapes: for offsets that serve them all."""
    common = set.intersection(*({*live.in_place.items()} for live in lives))
    return [replace(live, in_place=dict(sorted(common))) for live in lives]


def _dying_twin(node: Node, made: Storage, live: Liveness) -> str | None:
    if not _goes_element_by_element(node) or len(live.leaves[node.name]) != 1 or not made.nbytes:
        return None
    (result,) = live.leaves[node.name]
    operands = [leaf for source in node.all_input_nodes for leaf in live.leaves[source.name] if leaf is not None]
    for operand in operands:
        storage = live.storages.get(operand.storage or "")
        if storage is None or storage.kind != "activation" or storage.end != made.start + 1:
            continue
        if storage.nbytes == made.nbytes and storage.device == made.device and _alike(operands, storage, result):
            return storage.name
    return None


def _alike(operands: list[Leaf], storage: Storage, result: Leaf | None) -> bool:
    """Whether all operands in this storage lie exactly as the result will."""
    return result is not None and all(
        operand.layout == result.layout for operand in operands if operand.storage == storage.name
    )


def _goes_element_by_element(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or mutates(node):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in _ROW_BY_ROW
