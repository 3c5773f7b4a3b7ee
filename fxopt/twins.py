"""Which decoder layers of a model do the same as each other, on the evidence of a run.

Two layers are of one kind when their modules are alike in everything but their number and the values
of their weights, and when, run for real, they called the same operators on the same things: what they
were given, their own weights, what they had made before. A layer that leaves something behind in its
modules is a kind of its own, and so is every other for which the evidence is not plain.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, PreTrainedModel

from fxopt.program import KVShape

#: Tensors up to this size that come from nowhere are compared by value.
FEW = 64


@dataclass(frozen=True)
class Kinds:
    """The decoder layers in order, each with a number that it shares with the layers of its kind."""

    layers: tuple[nn.Module, ...] = ()
    numbers: tuple[int, ...] = ()

    def has_twin(self, layer: int) -> bool:
        """Whether another layer is of the same kind."""
        return self.numbers.count(self.numbers[layer]) > 1

    @property
    def has_twins(self) -> bool:
        """Whether any layer stands for another."""
        return len(set(self.numbers)) < len(self.numbers)


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The modules of the decoder's layers: the outermost list of several different ones."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(set(module)) > 1:
            return tuple(module)
    return ()


class Recorder(TorchDispatchMode):
    """Writes down what each of some layers does while a model runs."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = tuple(layers)
        self._records: dict[int, list[_Record]] = {}
        self._current: _Record | None = None
        self._runs = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record everything that the layers do meanwhile, in one run of the model."""
        self._runs += 1
        hooks = []
        for number, layer in enumerate(self._layers):
            begin = functools.partial(self._begin, number)
            hooks.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._end))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def kinds(self, shapes: Sequence[KVShape]) -> Kinds:
        """Sort the layers by what was seen of them and by the shapes that each keeps."""
        if len(shapes) != len(self._layers):
            return Kinds()
        numbers: list[int] = []
        for index, layer in enumerate(self._layers):
            like = (
                numbers[other]
                for other in range(index)
                if shapes[other] == shapes[index]
                and self._did_the_same(other, index)
                and alike(self._layers[other], layer, (other, index))
            )
            numbers.append(next(like, index))
        return Kinds(self._layers, tuple(numbers))

    def _did_the_same(self, a: int, b: int) -> bool:
        one, other = self._records.get(a, []), self._records.get(b, [])
        return len(one) == len(other) == self._runs and all(
            x.calls == y.calls and not x.left_something and not y.left_something
            for x, y in zip(one, other, strict=True)
        )

    def _begin(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = _Record(number, layer, (args, kwargs))
        self._records.setdefault(number, []).append(self._current)

    def _end(self, layer: nn.Module, args: Any, result: Any) -> None:
        if self._current is not None:
            self._current.result(result)
        self._current = None

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if self._current is not None:
            self._current.call(func, (args, dict(kwargs or {})), made)
        return made


class _Record:
    """The operators that one layer called, on what."""

    def __init__(self, number: int, layer: nn.Module, given: Any) -> None:
        self.calls: list[Hashable] = []
        self.left_something = False
        self._layer = layer
        self._before = _state(layer)
        self._names: dict[int, Hashable] = {}
        self._held: list[Tensor] = []  # so that no other tensor gets the id of one that is named
        self._strangers: list[Tensor] = []  # the same for those that layers are compared by
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            self._name(tensor, ("own", name))
        for path, leaf in leaves(given).items():
            if isinstance(leaf, Tensor):
                self._name(leaf, ("given", path))
            if is_cache(leaf):
                self._name_kept(leaf, number)

    def _name_kept(self, cache: Any, number: int) -> None:
        for what in ("keys", "values"):
            kept = getattr(cache.layers[number], what, None) if number < len(cache.layers) else None
            if isinstance(kept, Tensor):
                self._name(kept, ("kept", what))

    def call(self, func: Callable[..., Any], given: Any, made: Any) -> None:
        self.calls.append((func, self._described(given)))
        for place, tensor in enumerate(pytree.tree_leaves(made)):
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                self._name(tensor, ("made", len(self.calls), place))

    def result(self, result: Any) -> None:
        """Say what came out, and let go: there may be no room for the tensors of all layers at once."""
        self.calls.append(("returns", self._described(result)))
        self.left_something = _state(self._layer) != self._before
        self._held.clear()
        self._names.clear()

    def _name(self, tensor: Tensor, name: Hashable) -> None:
        self._names.setdefault(id(tensor), name)
        self._held.append(tensor)

    def _described(self, value: Any) -> Hashable:
        return tuple((path, type(leaf), self._leaf(leaf)) for path, leaf in leaves(value).items())

    def _leaf(self, leaf: Any) -> Hashable:
        if not isinstance(leaf, Tensor):
            return id(leaf) if is_cache(leaf) else str(leaf)
        about = (leaf.dtype, leaf.device, tuple(leaf.shape), leaf.stride())
        name = self._names.get(id(leaf))
        if name is None and leaf.numel() <= FEW and not (leaf.is_meta or isinstance(leaf, FakeTensor)):
            with unset_fake_temporarily():  # a number in the model's code is real, also where the model is not
                name = str(leaf.tolist())
        if name is None:
            self._strangers.append(leaf)
            name = id(leaf)
        return (about, name)


def _state(layer: nn.Module) -> list[Hashable]:
    """Which objects a layer's modules hold, also in their lists and tables."""
    found: list[Hashable] = []
    for module in layer.modules():
        for name, value in vars(module).items():
            inside = value.values() if isinstance(value, Mapping) else value
            parts = inside if isinstance(value, (Mapping, list, set, deque)) else ()
            found.append((name, id(value), *map(id, parts)))
    return found


def is_cache(value: Any) -> bool:
    return isinstance(value, Cache)


def leaves(value: Any) -> dict[str, Any]:
    """What a nested value holds, by path; a cache counts as one thing."""
    found, _ = pytree.tree_flatten_with_path(value, is_leaf=is_cache)
    return {pytree.keystr(path): leaf for path, leaf in found}


def alike(a: Any, b: Any, numbers: tuple[int, int]) -> bool:
    """Whether two modules, or two settings of theirs, differ in nothing but weights and their own ``numbers``."""
    return _Comparison(numbers).alike(a, b)


class _Comparison:
    """Compares nested things, each two of them once: modules may hold each other."""

    def __init__(self, numbers: tuple[int, int]) -> None:
        self._numbers = numbers
        self._begun: set[tuple[int, int]] = set()

    def alike(self, a: Any, b: Any) -> bool:
        if a is b or (id(a), id(b)) in self._begun:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, Tensor):
            return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        if isinstance(a, int) and not isinstance(a, bool):
            return a == b or (a, b) == self._numbers  # the place in the model, which says where the cache is
        if isinstance(a, (str, float, bool, set, frozenset, torch.dtype, torch.device)):
            return bool(a == b)
        self._begun.add((id(a), id(b)))
        return self._parts_alike(a, b)

    def _parts_alike(self, a: Any, b: Any) -> bool:
        if isinstance(a, Mapping):
            return list(a) == list(b) and all(self.alike(a[key], b[key]) for key in a)
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(self.alike(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, functools.partial):
            return a.func is b.func and self.alike((a.args, a.keywords), (b.args, b.keywords))
        return isinstance(a, nn.Module) and self.alike(vars(a), vars(b))
