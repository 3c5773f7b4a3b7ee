"""What one call of the graph launches: every kernel behind it, what each reads, writes and computes.

A call is run on fake tensors of the given sizes under a recorder. PyTorch's own decompositions then
say which kernels there are: ``linear`` is views and an ``mm``, attention is whatever the device has.
Alike calls, of which a model has one per layer, are run once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

#: Ops whose result holds what lies in memory already, in another place or order.
_COPIES = frozenset(
    {"_to_copy", "cat", "clone", "constant_pad_nd", "copy", "copy_", "flip", "lift_fresh_copy", "repeat", "roll"}
    | {"split_with_sizes_copy", "stack", "view_copy"}
)
#: Ops that read from their first operand only what their result holds.
_LOOKUPS = frozenset({"embedding", "gather", "index", "index_select"})
#: Ops that write into their first operand, and only as much as their last operand holds.
_ROW_WRITES = frozenset({"index_copy_", "index_put_", "scatter_"})
_OVERWRITES = frozenset({"copy_", "fill_", "zero_"})
_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"})
#: Rows times the weights of the expert that each belongs to; Transformers has its own where ATen has no kernel.
EXPERT_PRODUCTS = frozenset({"_grouped_mm", "grouped_mm_fallback"})
#: Operations per element of ops that are several loops in one.
FLOPS_PER_ELEMENT = {"_softmax": 5, "_safe_softmax": 5, "_log_softmax": 5, "native_layer_norm": 7, "_fused_rms_norm": 5}
_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Layout(NamedTuple):
    """A tensor as numbers; ``offset`` counts from the start of the memory that it lies in."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        sizes, offset = tuple(tensor.shape), int(tensor.storage_offset())
        return cls(sizes, dense_where_single(sizes, tensor.stride()), offset, tensor.dtype, tensor.device)

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes that reading it touches: a dimension of stride 0 lies in memory once."""
        once = math.prod(size for size, stride in zip(self.sizes, self.strides, strict=True) if stride or not size)
        return once * self.dtype.itemsize


def dense_where_single(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of which those that are never taken are as in dense memory; fake tensors choose them at will."""
    chosen = list(strides)
    for dim in reversed(range(len(sizes))):
        if sizes[dim] == 1:
            chosen[dim] = sizes[dim + 1] * chosen[dim + 1] if dim + 1 < len(sizes) else 1
    return tuple(chosen)


class Part(NamedTuple):
    """A tensor in a call: one of its operands' memories, counted from 0, or one that it makes."""

    memory: int
    layout: Layout


class Access(NamedTuple):
    """Bytes of one memory that a kernel reads or writes, and through which window."""

    part: Part
    nbytes: int


@dataclass(frozen=True)
class Launch:
    """One kernel of a call."""

    op: Any
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    copies: bool = False  # only moves data
    flops: int = 0


@dataclass(frozen=True)
class Call:
    """What one call does: ``result`` is nested like the op's own, with a :class:`Part` for each tensor."""

    launches: tuple[Launch, ...]
    made: tuple[int, ...]  # bytes of each memory that the call makes; they count on from the operands
    result: Any


_calls: dict[Any, Call] = {}
_MOST_CALLS = 10_000


def call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """What ``target`` launches for arguments in which a :class:`Layout` stands for each tensor."""
    key = (target, _key(args), tuple([(name, _key(value)) for name, value in kwargs.items()]))
    known = _calls.get(key)
    if known is None:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        known = _calls[key] = _recorded(target, args, kwargs)
    return known


def _key(value: Any) -> Any:
    """Equal for equal calls, wherever in a larger memory the operands lie; 1, 1.0 and True differ."""
    if isinstance(value, Layout):
        return (value.sizes, value.strides, value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return tuple([_key(item) for item in value])
    return (value.__class__, value)


def _recorded(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode():
        leaves, nesting = pytree.tree_flatten((list(args), dict(kwargs)), is_leaf=_is_layout)
        fakes = [_fake(leaf) if _is_layout(leaf) else leaf for leaf in leaves]
        recorder = _Recorder([fake for fake in fakes if isinstance(fake, Tensor)])
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, nesting)
        with recorder:
            result = target(*fake_args, **fake_kwargs)
        parts = pytree.tree_map_only(Tensor, recorder.part, result)
    return Call(tuple(recorder.launches), tuple(recorder.made), parts)


def _is_layout(value: Any) -> bool:
    return isinstance(value, Layout)


def _fake(layout: Layout) -> Tensor:
    return torch.empty_strided(layout.sizes, layout.strides, dtype=layout.dtype, device=layout.device)


class _Recorder(TorchDispatchMode):
    """Notes every kernel that runs under it, and which memory each tensor lies in."""

    def __init__(self, operands: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.made: list[int] = []
        self._seen = list(operands)  # keeps storages alive, so that none is taken for another
        self._memories = {_storage(operand): index for index, operand in enumerate(operands)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        reads = [self.part(operand) for operand in operands if _storage(operand) in self._memories]
        new = [self._make(tensor) for tensor in results if _storage(tensor) not in self._memories]
        written = [self.part(tensor) for tensor in _written(func, args, kwargs)]
        if (new or written) and op_name(func) not in _ALLOCATIONS:
            self.launches.append(_launch(func, reads, new + written, _flops(func, args, kwargs, result)))
        return result

    def part(self, tensor: Tensor) -> Part:
        if _storage(tensor) not in self._memories:
            return self._make(tensor)
        return Part(self._memories[_storage(tensor)], Layout.of(tensor))

    def _make(self, tensor: Tensor) -> Part:
        self._memories[_storage(tensor)] = len(self._memories)
        self._seen.append(tensor)
        self.made.append(tensor.untyped_storage().nbytes())
        return self.part(tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def op_name(op: Any) -> str:
    return str(op.overloadpacket.__name__) if isinstance(op, torch._ops.OpOverload) else str(op)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    values = [
        args[position] if position < len(args) else kwargs.get(parameter.name)
        for position, parameter in enumerate(func._schema.arguments)
        if parameter.alias_info is not None and parameter.alias_info.is_write
    ]
    return [value for value in values if isinstance(value, Tensor)]


def _launch(op: Any, reads: list[Part], writes: list[Part], flops: int) -> Launch:
    name = op_name(op)
    read = {position: part.layout.nbytes for position, part in enumerate(reads)}
    written = [part.layout.nbytes for part in writes]
    if name in _LOOKUPS:
        read[0] = min(read[0], written[0])
    elif name in EXPERT_PRODUCTS:
        read[1] = read[1] * min(reads[0].layout.sizes[0], reads[1].layout.sizes[0]) // reads[1].layout.sizes[0]
    elif name in _ROW_WRITES:
        written = [min(written[0], reads[-1].layout.elements * writes[0].layout.dtype.itemsize)]
    if name in _ROW_WRITES | _OVERWRITES:
        del read[0]
    return Launch(
        op,
        tuple([Access(reads[position], nbytes) for position, nbytes in read.items()]),
        tuple([Access(part, nbytes) for part, nbytes in zip(writes, written, strict=True)]),
        name in _COPIES and all(part.layout.dtype == writes[0].layout.dtype for part in reads),
        flops,
    )


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Multiplications and additions, as PyTorch's own counter counts them; one per element of a loop."""
    name, counter = op_name(func), flop_registry.get(getattr(func, "overloadpacket", None))
    if counter is not None:
        return int(counter(*args, **kwargs, out_val=result))
    if name == _CPU_ATTENTION:
        return int(sdpa_flop_count(*[operand.shape for operand in args[:3]]))
    if name in EXPERT_PRODUCTS:
        return int(2 * args[0].numel() * args[1].shape[-1])
    first = next(iter(pytree.tree_leaves(result)), None)
    if not isinstance(first, Tensor) or not first.is_floating_point() or name in _COPIES:
        return 0
    if name in FLOPS_PER_ELEMENT:
        return FLOPS_PER_ELEMENT[name] * first.numel()
    if torch.Tag.reduction in func.tags:
        return int(args[0].numel())
    return first.numel() if torch.Tag.pointwise in func.tags else 0
