"""Which tensors are one memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree


class MemoryClasses:
    """Storages that are one memory: a class is named by one of them."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def of(self, tensor: Tensor) -> int:
        found = int(tensor.untyped_storage()._cdata)
        while (parent := self._parents.get(found, found)) != found:
            found = parent
        return found

    def join(self, kept: Tensor, other: Tensor) -> None:
        one, two = self.of(kept), self.of(other)
        if one != two:
            self._parents[two] = one


def promised_aliases(
    node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Operands and results that are one memory by the schema of the op, whatever its fake does.

    An op that is written in terms of others may promise a view and yet copy; that is left to the fake.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    schema = target._schema
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    returned = [result] if len(schema.returns) == 1 else result
    for parameter, value in zip(schema.returns, returned or (), strict=False):
        if parameter.alias_info is None or (composite and not parameter.alias_info.is_write):
            continue
        for position, argument in enumerate(schema.arguments):
            operand = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.before_set & parameter.alias_info.before_set:
                yield from ((tensor, made) for tensor in tensors(operand)[:1] for made in tensors(value))


def tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, Tensor)]
