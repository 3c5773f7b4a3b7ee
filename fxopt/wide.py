"""Any model in a wider dtype, without a wider copy of its weights.

What a rewritten graph may differ by depends on how far the stock model itself is from the truth. The
truth is approximated by running the stock model's own code with every operator computing in the
next wider dtype: weights are widened one at a time, as they are read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

#: What stands in for the truth about a dtype. Float64 has nothing wider.
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


MOST_AT_ONCE = 2**20  # numbers of a weight that are widened together

aten = torch.ops.aten
_GATHERS = frozenset({aten.embedding.default, aten.index_select.default})


@contextlib.contextmanager
def wide(dtype: torch.dtype) -> Iterator[None]:
    """Every operator called meanwhile computes in ``dtype`` wherever it would in a narrower float."""
    with _AsWideAsItCan(), _Wide(dtype):
        yield


class _Wide(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self._narrow = {kind for kind in (*WIDER, torch.float64) if kind.itemsize < dtype.itemsize}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_view(func):  # widened where it is computed with
            return func(*args, **kwargs)
        if func in _GATHERS:  # all of a table, for the sake of a few rows, would be a copy of it
            return self._widened(func(*args, **kwargs), ())
        if func is aten.mm.default and args[1].dtype in self._narrow and args[1].numel() > MOST_AT_ONCE:
            columns = args[1].split(max(1, MOST_AT_ONCE // args[1].shape[0]), dim=1)
            return torch.cat([self._widened(args[0], ()) @ self._widened(part, ()) for part in columns], dim=1)
        written = _written(func, args, kwargs)
        widened = {name: self._widened(value, written) for name, value in kwargs.items()}
        return func(*self._widened(args, written), **widened)

    def _widened(self, value: Any, written: Sequence[Any]) -> Any:
        if isinstance(value, Tensor):
            stays = value.dtype not in self._narrow or any(value is one for one in written)
            return value if stays else value.to(self.dtype)
        if isinstance(value, (tuple, list)):  # operators know no other containers; pytree would take half of all time
            return type(value)([self._widened(one, written) for one in value])
        return self.dtype if isinstance(value, torch.dtype) and value in self._narrow else value


class _AsWideAsItCan(TorchFunctionMode):
    """A function without a kernel for float64 (ATen's grouped matmul) computes in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            with _disable_current_modes():
                args, kwargs = pytree.tree_map(_narrowed, (args, kwargs))
                return func(*args, **kwargs)


@functools.cache  # reading a schema takes as long as a small operator
def _is_view(func: Any) -> bool:
    schema = getattr(func, "_schema", None)  # higher-order operators have none
    returns = schema.returns if schema is not None else ()
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def _narrowed(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value is torch.float64 else value
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.float64 else value


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operator writes into: those must stay the tensors that they are."""
    return [args[index] if index < len(args) else kwargs.get(name) for index, name in _written_parameters(func)]


@functools.cache
def _written_parameters(func: Any) -> list[tuple[int, str]]:
    schema = getattr(func, "_schema", None)
    parameters = enumerate(schema.arguments if schema is not None else ())
    return [(index, one.name) for index, one in parameters if one.alias_info is not None and one.alias_info.is_write]
