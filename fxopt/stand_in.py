"""Layers of a kind are traced once while a model is exported; each further one is a copy of the first.

Tracing a layer with symbolic sizes takes a third of a second, far more than it takes to copy its nodes.
While the model runs under export, a layer whose twin has been traced on like arguments is not run: an
operator stands in for it. Afterwards the nodes of the twin are copied to where it stands, reading the
layer's own weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils import _pytree as pytree

from fxopt.symbols import described, fresh_like
from fxopt.twins import Kinds, is_cache


def _same(tensors: list[Tensor], layer: int) -> list[Tensor]:
    return [fresh_like(tensor) for tensor in tensors]


def _like(given: list[Tensor], like: list[Tensor], twin: int, layer: int) -> list[Tensor]:
    return [fresh_like(tensor) for tensor in like]


for name, signature, shapes in (
    ("enter_layer", "(Tensor[] given, int layer) -> Tensor[]", _same),
    ("leave_layer", "(Tensor[] made, int layer) -> Tensor[]", _same),
    ("layer_like", "(Tensor[] given, Tensor[] like, int twin, int layer) -> Tensor[]", _like),
):
    torch.library.define(f"fxopt::{name}", signature)
    torch.library.register_fake(f"fxopt::{name}", shapes)


@contextmanager
def standing_in(kinds: Kinds) -> Iterator[None]:
    """While a model is exported, trace one layer of each kind and let it stand for the others."""
    tracer = _Tracer(kinds)
    with ExitStack() as stack:
        for number, layer in enumerate(kinds.layers):
            if kinds.has_twin(number):
                stack.enter_context(_forward_of(layer, functools.partial(tracer.forward, number, layer.forward)))
        yield


@contextmanager
def _forward_of(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run something else for a while."""
    own = vars(layer)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


class _Call:
    """What one layer was called with: tensors, those of its cache last, and everything else."""

    def __init__(self, number: int, args: Any, kwargs: Any) -> None:
        self.number = number
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        self.caches = {id(leaf): leaf for leaf in self.leaves if is_cache(leaf)}
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        if self.can_be_stood_in_for:
            self.tensors += [self.kept.keys, self.kept.values]

    @property
    def can_be_stood_in_for(self) -> bool:
        """Whether the layer was given the one cache that it writes into."""
        return len(self.caches) == 1

    @property
    def kept(self) -> Any:
        """What the cache holds for this layer."""
        (cache,) = self.caches.values()
        return cache.layers[self.number]

    def is_like(self, other: _Call) -> bool:
        return (
            self.spec == other.spec
            and list(map(described, self.tensors)) == list(map(described, other.tensors))
            and all(
                a is b or (type(a) is type(b) and isinstance(a, (int, float, str)) and a == b)
                for a, b in zip(self.leaves, other.leaves, strict=True)
                if not isinstance(a, Tensor)
            )
        )


@dataclass
class _Traced:
    """A layer that was traced, and what it made: a result, and the keys and values that it keeps."""

    call: _Call
    leaves: list[Any]
    spec: Any
    made: list[Tensor]

    def result(self, made: list[Tensor], kept: Any) -> Any:
        """The same with other tensors, of which the last two go into a cache."""
        *tensors, kept.keys, kept.values = made
        rest = iter(tensors)
        return pytree.tree_unflatten(
            [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec
        )


class _Tracer:
    """Runs the layers of a model under export, or operators in their place."""

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._traced: dict[int, list[_Traced]] = {}

    def forward(self, number: int, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _Call(number, args, kwargs)
        if not call.can_be_stood_in_for:
            return layer(*args, **kwargs)
        known = self._traced.setdefault(self._kinds.numbers[number], [])
        for twin in known:
            if twin.call.is_like(call):
                made = torch.ops.fxopt.layer_like(call.tensors, twin.made, twin.call.number, number)
                return twin.result(made, call.kept)
        known.append(self._trace(call, layer))
        return known[-1].result(known[-1].made, call.kept)

    def _trace(self, call: _Call, layer: Callable[..., Any]) -> _Traced:
        """Run a layer between two marks, so that its nodes are found again."""
        *given, call.kept.keys, call.kept.values = torch.ops.fxopt.enter_layer(call.tensors, call.number)
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        result, spec = pytree.tree_flatten(layer(*args, **kwargs), is_leaf=is_cache)
        made = [leaf for leaf in result if isinstance(leaf, Tensor)] + [call.kept.keys, call.kept.values]
        return _Traced(call, result, spec, torch.ops.fxopt.leave_layer(made, call.number))


_ENTER = torch.ops.fxopt.enter_layer.default
_LEAVE = torch.ops.fxopt.leave_layer.default
_LIKE = torch.ops.fxopt.layer_like.default
_NUMBER = re.compile(r"_\d+$")


def unfold(module: GraphModule, model: nn.Module, kinds: Kinds) -> None:
    """Copy the nodes of each traced layer to where an operator stands in for a twin of it."""
    paths = {layer: path for path, layer in model.named_modules()}
    enters, exits, stand_ins = (
        module.graph.find_nodes(op="call_function", target=target) for target in (_ENTER, _LEAVE, _LIKE)
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
