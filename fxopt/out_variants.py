"""Ops that compute into memory that they are given.

ATen's own ``out=`` overloads do, but for those that were generated: they allocate a result of their
own and copy it. An overload is found by the names and types of all its arguments, since the name
alone would take ``eq.Scalar_out`` for ``eq.Tensor``. Some plain ops without one are written here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten

Writer = Callable[[Sequence[Tensor], Sequence[Any], Mapping[str, Any]], None]  # results, then args and kwargs

#: What a result is made as; one that is given has all of it.
_OF_THE_RESULT = frozenset({"dtype", "layout", "device", "pin_memory"})
#: Operators of Python, which have no overload with ``out``, and the ops that they stand for.
_SAME_AS = {"__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor"}


@functools.cache
def writer(target: Any) -> Writer | None:
    """How to compute ``target`` into given results; None if there is no way without memory of its own."""
    if target in _WRITERS:
        return _WRITERS[target]
    if not isinstance(target, OpOverload) or (found := out_overload(target)) is None:
        return None
    overload = found
    outs = [argument.name for argument in overload._schema.arguments if argument.is_out]
    taken = {argument.name for argument in overload._schema.arguments}

    def write(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = {name: value for name, value in kwargs.items() if name in taken}
        overload(*args, **given, **dict(zip(outs, results, strict=True)))

    return write


def out_overload(target: OpOverload) -> OpOverload | None:
    """The overload that does the same into given results."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), _SAME_AS.get(name, name), None)
    if packet is None:
        return None
    for overload in packet.overloads():
        candidate: OpOverload = getattr(packet, overload)
        schema = candidate._schema
        outs = [str(argument.type) for argument in schema.arguments if argument.is_out]
        if (
            outs == [str(value.type) for value in target._schema.returns]
            and set(outs) == {"Tensor"}
            and _asks(schema) == _asks(target._schema)
            and torch.Tag.generated not in candidate.tags
        ):
            return candidate
    return None


def _asks(schema: Any) -> list[tuple[str, str, bool]]:
    """What a call must say, in order."""
    return [
        (argument.name, str(argument.type), argument.kwarg_only)
        for argument in schema.arguments
        if not argument.is_out and not (argument.kwarg_only and argument.name in _OF_THE_RESULT)
    ]


def _copy(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    (result,), source = results, args[0]
    if result.shape != source.shape:  # a reshape that had to copy: the same elements in the same order
        result = result.view(source.shape)
    result.copy_(source)


def _leave(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """What is empty may hold anything."""


def _fill_with(place: int) -> Writer:
    """Fill with the argument at a place of the call."""

    def fill(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        results[0].fill_(args[place] if place < len(args) else kwargs["fill_value"])

    return fill


def _zeros(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    results[0].zero_()


def _ones(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    results[0].fill_(1)


def _embed(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    (result,), weight, tokens = results, args[0], args[1]
    torch.index_select(weight, 0, tokens.reshape(-1), out=result.view(-1, weight.shape[1]))


def _flip(results: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Slice by slice: the rotary embedding flips two halves."""
    (result,), source = results, args[0]
    dims = [dim % source.dim() for dim in args[1]]
    if not dims:
        result.copy_(source)
        return
    dim, inner = dims[0], [other - (other > dims[0]) for other in dims[1:]]
    for place, mirrored in enumerate(reversed(range(source.shape[dim]))):
        _flip([result.select(dim, place)], [source.select(dim, mirrored), inner], kwargs)


#: Ops that hand out what may be uninitialised memory.
EMPTY = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
_COPIES = (
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)
_WRITERS: dict[Any, Writer] = {
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys(EMPTY, _leave),
    aten.embedding.default: _embed,
    aten.flip.default: _flip,
    aten.full_like.default: _fill_with(1),
    aten.new_full.default: _fill_with(2),
    aten.new_ones.default: _ones,
    aten.new_zeros.default: _zeros,
    aten.ones_like.default: _ones,
    aten.scalar_tensor.default: _fill_with(0),
    aten.zeros_like.default: _zeros,
}
