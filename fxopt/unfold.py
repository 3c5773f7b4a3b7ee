"""The copies of a layer that was traced for all of its kind.

Where an operator stands in for a layer (:mod:`fxopt.stand_in`), the nodes of the twin that was traced are
copied, reading the layer's own weights. The graph is then what tracing every layer would have given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, map_arg

from fxopt.stand_in import ENTER, LEAVE, LIKE
from fxopt.twins import Kinds

_NUMBER = re.compile(r"_\d+$")


def unfold(module: GraphModule, model: nn.Module, kinds: Kinds) -> None:
    """Copy the nodes of each traced layer to where an operator stands in for a twin of it."""
    paths = {layer: path for path, layer in model.named_modules()}
    enters, exits, stand_ins = (
        module.graph.find_nodes(op="call_function", target=target) for target in (ENTER, LEAVE, LIKE)
    )
    readers = {attrgetter(node.target)(module): node for node in module.graph.find_nodes(op="get_attr")}
    bodies = {enter.args[1]: _Body(enter, leave) for enter, leave in zip(enters, exits, strict=True)}
    for node in stand_ins:
        _, _, twin, number = node.args
        start, end = kinds.layers[twin], kinds.layers[number]
        weights = {readers[weight]: readers[other] for weight, other in _own_weights(start, end) if weight in readers}
        _copy(bodies[twin], node, weights, _Move(paths[start], paths[end]))
    for body in bodies.values():
        for mark in (body.leave, body.enter):
            _take_apart(mark, _nodes(mark.args[0]))
    if stand_ins:
        module.graph = _numbered_in_order(module.graph)


class _Body:
    """The nodes of one traced layer, between the marks."""

    def __init__(self, enter: Node, leave: Node) -> None:
        self.enter, self.leave = enter, leave
        self.given = {node: _place(node) for node in enter.users}
        self.nodes: list[Node] = []
        node = enter.next
        while node is not leave:
            # Sizes are the same for every layer; what computes or checks them stays as it is.
            if node not in self.given and any(map(_is_tensor, (node, *node.all_input_nodes))):
                self.nodes.append(node)
            node = node.next


def _own_weights(layer: nn.Module, twin: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights of a layer with those that its twin has in their place. Other layers may share either of them."""
    for path, weight in (*layer.named_parameters(), *layer.named_buffers()):
        yield weight, attrgetter(path)(twin)


@dataclass(frozen=True)
class _Move:
    """From the path of one module to that of its twin."""

    start: str
    end: str

    def __call__(self, path: str) -> str:
        """Where the twin has what lies at ``path``; what is not inside the module is shared."""
        inside = path == self.start or path.startswith(f"{self.start}.")
        return self.end + path[len(self.start) :] if inside else path


def _copy(body: _Body, stand_in: Node, weights: Mapping[Node, Node], move: _Move) -> None:
    """Put the nodes of a traced layer in the place of a stand-in, with other ``weights``."""
    graph = stand_in.graph
    given = _nodes(stand_in.args[0])
    twins = {**weights, **{node: given[place] for node, place in body.given.items()}}

    def twin(node: Node) -> Node:
        return twins.get(node, node)  # constants in the model's code, and what lies outside of the layer, are shared

    with graph.inserting_before(stand_in):
        for node in body.nodes:
            copy = twins[node] = graph.node_copy(node, twin)
            stack = node.meta.get("nn_module_stack") or {}
            copy.meta["nn_module_stack"] = {key: (move(path), kind) for key, (path, kind) in stack.items()}
    _take_apart(stand_in, [twin(node) for node in _nodes(body.leave.args[0])])


def _numbered_in_order(graph: Graph) -> Graph:
    """The same graph with the names that a trace gives: ``add``, ``add_1``, ``add_2`` from first to last."""
    fresh = Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        stem = _NUMBER.sub("", node.name)
        copies[node] = fresh.create_node(node.op, node.target, args, kwargs, stem, node.type)
        copies[node].meta = node.meta
    return fresh


def _take_apart(node: Node, parts: Sequence[Node]) -> None:
    """Let whoever takes a tensor out of a list take the tensor."""
    for taken in list(node.users):
        taken.replace_all_uses_with(parts[_place(taken)])
        node.graph.erase_node(taken)
    node.graph.erase_node(node)


def _nodes(argument: Any) -> list[Node]:
    """The tensors of an operator's first argument."""
    return list(argument)


def _place(taken: Node) -> int:
    """Which tensor of a list a node takes."""
    return cast(int, taken.args[1])


def _is_tensor(node: Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), (Tensor, list, tuple))
