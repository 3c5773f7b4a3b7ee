"""Layers of a kind are traced once while a model is exported; an operator stands in for each further one.

Tracing a layer with symbolic sizes takes a third of a second, far more than it takes to copy its nodes.
While the model runs under export, a layer whose twin has been traced on like arguments is not run. What
such an operator stands for is put in its place afterwards, by :mod:`fxopt.unfold`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
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

ENTER = torch.ops.fxopt.enter_layer.default
LEAVE = torch.ops.fxopt.leave_layer.default
LIKE = torch.ops.fxopt.layer_like.default


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
                made = LIKE(call.tensors, twin.made, twin.call.number, number)
                return twin.result(made, call.kept)
        known.append(self._trace(call, layer))
        return known[-1].result(known[-1].made, call.kept)

    def _trace(self, call: _Call, layer: Callable[..., Any]) -> _Traced:
        """Run a layer between two marks, so that its nodes are found again."""
        *given, call.kept.keys, call.kept.values = ENTER(call.tensors, call.number)
        tensors = iter(given)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        result, spec = pytree.tree_flatten(layer(*args, **kwargs), is_leaf=is_cache)
        made = [leaf for leaf in result if isinstance(leaf, Tensor)] + [call.kept.keys, call.kept.values]
        return _Traced(call, result, spec, LEAVE(made, call.number))
