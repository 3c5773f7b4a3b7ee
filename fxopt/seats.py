"""Weights of compiled code that lie packed, while the model's parameters come and go.

Code that Dynamo runs is handed the parameters with every call. Where passes have joined some of them,
the compiled code reads one packed weight instead, of which the parameters are views
(:mod:`fxopt.weights`): updates in place reach it by themselves. A parameter that was replaced or moved
lies at another address, which is looked at before every run; then the weights are packed again, or the
graph runs as it was before any pass. Old weights are never read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.errors import first_line
from fxopt.weights import are_adjacent, joined

log = logging.getLogger("fxopt")

MOST_MOVES = 8  # packings of one piece of code; weights that move more often are never at rest
ALIGNMENT = 16  # bytes; kernels for accelerators may rely on it

Run = Callable[..., Any]

_packing = threading.Lock()  # several pieces of code may read the same weights
_ours: set[StorageWeakRef] = set()  # storages that weights were packed into, for as long as they live


def _is_ours(tensor: Tensor) -> bool:
    """Whether a weight lies in a storage from an earlier packing, which it may leave again."""
    return StorageWeakRef(tensor.untyped_storage()) in _ours


def why_not_joined(tensors: Sequence[Tensor]) -> str | None:
    """What keeps these weights from becoming views of one storage, or None."""
    if any(type(tensor) is not nn.Parameter for tensor in tensors):
        return "one of them is no plain parameter of a module"
    if are_adjacent(tensors):
        return None
    for tensor in tensors:
        if tensor.device.type == "meta" or tensor.device != tensors[0].device or tensor.numel() == 0:
            return "they have no memory, or not on one device"
        if tensor.layout is not torch.strided or not tensor.is_contiguous():
            return "one of them does not lie row by row"
        if tensor.untyped_storage().nbytes() != tensor.nbytes and not _is_ours(tensor):
            return "one of them is part of a larger storage already"
        if tensor.device.type == "cpu" and tensor.is_shared():
            return "one of them lies in memory that other processes share"
        if tensor.device.type != "cpu" and tensor.nbytes % ALIGNMENT:
            return f"the bytes of one of them are no multiple of {ALIGNMENT}, on which kernels rely"
    if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
        return "two of them are the same memory"
    return None


@dataclass(frozen=True)
class Seats:
    """Where the parameters lay when they were packed, and the weights that they are views of."""

    addresses: list[int]
    packed: list[Tensor]


class SeatedCode:
    """Compiled code with packed weights behind its inputs; ``groups`` are positions of what each joins."""

    def __init__(self, compiled: Run, untouched: Run, groups: Sequence[Sequence[int]]) -> None:
        self._compiled = compiled
        self._untouched = untouched
        self._groups = [tuple(group) for group in groups]
        self._members = [position for group in self._groups for position in group]
        self._seats: Seats | None = None
        self._moves = 0
        self._said = ""

    def __call__(self, *inputs: Any) -> Any:
        seats = self._seats
        if seats is None or [inputs[position].data_ptr() for position in self._members] != seats.addresses:
            seats = self._settled(inputs)
        if seats is None:
            return self._untouched(*inputs)
        return self._compiled(*inputs, *seats.packed)

    def _settled(self, inputs: Sequence[Any]) -> Seats | None:
        """Pack the parameters that came in, if they can be; kept for the next call."""
        groups = [[inputs[position] for position in group] for group in self._groups]
        with _packing:
            try:
                self._seats, reason = self._packed(groups)
            except Exception as error:
                self._seats, reason = None, f"packing failed with {type(error).__name__}: {first_line(error)}"
                self._moves = MOST_MOVES
            if reason is not None and reason != self._said:
                log.warning("the weights are not packed (%s), so the graph runs as it was before any pass", reason)
                self._said = reason
            return self._seats

    def _packed(self, groups: Sequence[Sequence[Tensor]]) -> tuple[Seats | None, str | None]:
        """The seats of these parameters, or why they have none."""
        if (reason := next(filter(None, map(why_not_joined, groups)), None)) is not None:
            return None, reason
        apart = [not are_adjacent(group) for group in groups]
        if any(apart) and self._moves >= MOST_MOVES:
            return None, f"they have moved {MOST_MOVES} times"
        self._moves += any(apart)
        # What is made in inference mode could not be trained afterwards.
        with torch.inference_mode(False), torch.no_grad():
            packed = [joined(group) for group in groups]
        _ours.difference_update([storage for storage in _ours if storage.expired()])
        _ours.update(StorageWeakRef(whole.untyped_storage()) for whole, new in zip(packed, apart, strict=True) if new)
        addresses = [tensor.data_ptr() for group in groups for tensor in group]
        if addresses != _addresses_in(packed, groups):
            self._moves = MOST_MOVES
            return None, "one of them is in two groups, and can lie in one only"
        return Seats(addresses, packed), None


def _addresses_in(packed: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> list[int]:
    """Where each member must lie for the packed weights to be made of them."""
    return [
        start
        for whole, group in zip(packed, groups, strict=True)
        for start in accumulate((tensor.nbytes for tensor in group[:-1]), initial=whole.data_ptr())
    ]
