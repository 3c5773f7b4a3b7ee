"""The stock model with rounded weights, without a second copy of them.

What graphs say that read codes is compared with the stock model's own code on weights that were rounded
in the same format. Those are made one at a time, where they are read: codes are kept, the weights of the
model are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxopt.weight_formats import CodedWeight

#: What looks weights up or describes them, rather than computing with them.
_LOOKUPS = frozenset({torch.nn.functional.embedding, torch.embedding, torch.Tensor.dim, torch.Tensor.size})
_TURNED: Any = torch.Tensor.T


class RoundedWeights(TorchFunctionMode):
    """While it is on, every function but an embedding is handed rounded weights for some of a model's own."""

    def __init__(self, model: nn.Module, weights: Sequence[CodedWeight]) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self._kept: dict[int, tuple[CodedWeight, Tensor, Sequence[Tensor]]] = {}
        with torch.no_grad():
            for coded in weights:
                for name in coded.of:
                    weight = model.get_parameter(own_name(name))
                    self._kept[id(weight)] = coded, weight, coded.encode([weight])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        describes = getattr(func, "__name__", "") == "__get__" and func != _TURNED.__get__
        if describes or func in _LOOKUPS:
            return func(*args, **kwargs)
        args = tuple(self._rounded(value) for value in args)
        return func(*args, **{name: self._rounded(value) for name, value in kwargs.items()})

    def _rounded(self, value: Any) -> Any:
        found = self._kept.get(id(value))
        if found is None:
            return value
        coded, weight, parts = found
        return coded.decoded(parts, weight.shape[0 if coded.turned else 1], weight.dtype)


def own_name(captured: str) -> str:
    """What the model calls a weight, from what its captured graph does."""
    return captured.removeprefix("model.")
