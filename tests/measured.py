"""What PyTorch's profiler saw of one decode step: the other side of every comparison with ``step_cost``.

Run as it stands, an op counts as a kernel if PyTorch has code of its own for it. Ops that are defined by other ops
(``linear``, ``softmax``) are looked into; what a kernel calls inside (``mean`` calls ``sum`` and ``div_``) is its own
affair. Views and allocations are none. Bytes read are those of the operands that the profiler noted, bytes written
those that were allocated and kept, or those of the operand that an op writes into.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType, _TensorMetadata
from torch.profiler import ProfilerActivity, profile, record_function

from fxopt.program import ATTENTION_MASK, CACHE_POSITION, LOGIT_POSITIONS, Program, key_name, whole_windows

MARK = "decode graph"
LOOKUPS = ("embedding", "gather", "index", "index_select")
ROW_WRITES = ("index_copy_", "index_put_")


@dataclass(frozen=True)
class Measured:
    """One run of a graph, op by op."""

    launches: tuple[str, ...]  # by name
    moved_bytes: int
    peak_bytes: int


def run_as_it_stands(program: Program, context: int, batch: int = 1) -> Measured:
    """Any graph of a program, the captured one included."""
    tensors = _inputs(program, context, batch)
    with torch.no_grad():
        program.gm(*tensors)  # the first run is unlike the others
        with _profiler() as profiler, record_function(MARK):
            program.gm(*tensors)
    return _measured(_marked(profiler))


def step_of_engine(fast: Any, context: int) -> Measured:
    """One decode step of a model optimised without a compiler."""
    return _measured(_engine_events(fast.fxopt.engine, context))


def compiled_launches(fast: Any, context: int) -> list[str]:
    """Kernels that Inductor wrote, and ops of libraries that it calls. Needs ``enable_kernel_profile``."""
    return list(_compiled(_engine_events(fast.fxopt.engine, context)))


def _inputs(program: Program, context: int, batch: int) -> list[Tensor]:
    inputs = program.placeholders()
    grows = isinstance(inputs[key_name(0)].meta["val"].shape[2], torch.SymInt)
    rows = context - 1 if grows else program.facts.capacity
    fixed = inputs[ATTENTION_MASK].meta["val"].shape[1]
    window = context if grows else fixed if isinstance(fixed, int) else whole_windows(context)
    known = {
        ATTENTION_MASK: torch.ones(batch, window, dtype=torch.long),
        CACHE_POSITION: torch.tensor([context - 1]),
        LOGIT_POSITIONS: torch.tensor([0]),
    }

    def tensor(name: str, example: Tensor) -> Tensor:
        if example.dim() == 4:
            return torch.randn(batch, example.shape[1], rows, example.shape[3], dtype=example.dtype)
        return known.get(name, torch.full((batch, 1), context - 1))

    return [tensor(name, node.meta["val"]) for name, node in inputs.items()]


def _engine_events(engine: Any, context: int) -> list[Any]:
    lowered = engine.lowered(engine.decode_role(1))
    run = lowered.call

    def marked(*tensors: Any) -> Any:
        with record_function(MARK):
            return run(*tensors)

    cache = engine.new_cache(1)
    cache.record_mask(None, context)
    tokens, positions = torch.ones(1, context, dtype=torch.long), torch.arange(context)[None]
    engine.step(cache, tokens[:, :-2], positions[:, :-2], keep=1)
    engine.step(cache, tokens[:, -2:-1], positions[:, -2:-1], keep=1)
    lowered.call = marked
    try:
        with _profiler() as profiler:
            engine.step(cache, tokens[:, -1:], positions[:, -1:], keep=1)
    finally:
        lowered.call = run
    return _marked(profiler)


@contextmanager
def _profiler() -> Iterator[Any]:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
        yield profiler


def _marked(profiler: Any) -> list[Any]:
    events = _all(profiler.profiler.kineto_results.experimental_event_tree())
    graph = next(event for event in events if event.name == MARK)
    children: list[Any] = graph.children
    return children


def _all(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all(event.children)


def _measured(events: list[Any]) -> Measured:
    kernels = list(_kernels(events))
    moved = sum(_bytes_read(kernel) + _bytes_written(kernel) for kernel in kernels)
    return Measured(tuple(_name(kernel) for kernel in kernels), moved, _peak(events))


def _name(event: Any) -> str:
    return str(event.name.rpartition("::")[2])


def _kernels(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        inner = list(_kernels(event.children))
        if event.typed[0] != _EventType.TorchOp or (inner and _may_be_defined_by_others(event)):
            yield from inner
        elif _name(event).endswith("_") or (not _name(event).startswith(("empty", "new_empty")) and _kept(event)):
            yield event


def _may_be_defined_by_others(event: Any) -> bool:
    """True of ``where`` as well: one of its forms calls another, and the profiler names both alike."""
    library, _, name = event.name.partition("::")
    packet = getattr(getattr(torch.ops, library), name, None) if name else None
    forms = [] if packet is None else [getattr(packet, form).name() for form in packet.overloads()]
    known = [form for form in forms if torch._C._dispatch_has_kernel(form)]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(form, "CompositeImplicitAutograd") for form in known)


def _compiled(events: Iterable[Any]) -> Iterator[str]:
    for event in events:
        if "cpp_fused" in event.name:
            yield "cpp_fused"
        elif event.typed[0] == _EventType.TorchOp and "::" in event.name:
            if not _name(event).startswith(("empty", "as_strided", "view", "_reinterpret_tensor")):
                yield _name(event)
        else:
            yield from _compiled(event.children)


def _kept(event: Any) -> int:
    """Bytes allocated under an event and not freed there again."""
    alive: dict[int, int] = {}
    for inner in _all(event.children):
        if inner.typed[0] == _EventType.Allocation:
            memory = inner.extra_fields
            alive[memory.ptr] = max(memory.alloc_size, 0)
    return sum(alive.values())


def _operands(event: Any) -> list[int]:
    """Bytes of each operand; a dimension of stride 0 lies in memory once."""
    flat: list[Any] = []
    for value in event.extra_fields.inputs:
        flat += value if isinstance(value, list) else [value]
    return [
        math.prod(size for size, stride in zip(t.sizes, t.strides, strict=True) if stride) * t.dtype.itemsize
        for t in flat
        if isinstance(t, _TensorMetadata)
    ]


def _bytes_read(event: Any) -> int:
    operands = _operands(event)
    if _name(event) in ("_grouped_mm", "grouped_mm_fallback"):  # a product for each expert, of no rows for some
        products = [inner for inner in _all(event.children) if inner.name in ("aten::mm", "aten::bmm")]
        return sum(_bytes_read(inner) for inner in products if _operands(inner)[0])
    if _name(event) in LOOKUPS:
        operands[0] = _kept(event)
    elif _name(event) in (*ROW_WRITES, "fill_"):
        operands[0] = 0
    return sum(operands)


def _bytes_written(event: Any) -> int:
    operands = _operands(event)
    if _name(event) in ROW_WRITES:
        return operands[-1]
    return operands[0] if _name(event).endswith("_") else _kept(event)


def _peak(events: Iterable[Any]) -> int:
    """Most bytes that lay in memory at once of those allocated meanwhile."""
    alive, most = 0, 0
    ours: set[int] = set()
    for event in _all(events):
        if event.typed[0] == _EventType.Allocation:
            memory = event.extra_fields
            if memory.alloc_size > 0:
                ours.add(memory.ptr)
            alive += memory.alloc_size if memory.ptr in ours else 0
            most = max(most, alive)
    return most
