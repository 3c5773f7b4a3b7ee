"""Every kernel of one decode step on a graph, in order, and the memory that each works on.

The graph is walked with numbers for its symbolic sizes. A memory is followed through views from where
it is made, so that what a kernel reads is known as weight, cache, input or activation.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxopt.launches import Access, Call, Launch, Layout, Part, call
from fxopt.program import Program
from fxopt.step_sizes import StepSizes
from fxopt.views import Concat

log = logging.getLogger("fxopt")


class Kind(Enum):
    """What a memory holds."""

    WEIGHT = "weight"
    CACHE = "cache"
    INPUT = "input"
    ACTIVATION = "activation"


@dataclass(eq=False)
class Memory:
    kind: Kind
    nbytes: int


@dataclass(frozen=True)
class Held:
    """The value of a node: a tensor, and the memory that it lies in."""

    layout: Layout
    memory: Memory


@dataclass(frozen=True)
class Kernel:
    """One launch, with the memories of its call: the operands' first, then what the call makes."""

    launch: Launch
    memories: Sequence[Memory]
    offsets: Sequence[int]
    node: Node | None = None  # of the graph itself, not of a body that it wraps

    def reads(self) -> Iterator[tuple[Memory, object, int]]:
        """Each memory, a key for the window that is read of it, and the bytes."""
        for (index, layout), nbytes in self.launch.reads:
            yield self.memories[index], (self.offsets[index] + layout.offset, layout.sizes, layout.strides), nbytes

    def writes(self) -> Iterator[tuple[Memory, int]]:
        for (index, _), nbytes in self.launch.writes:
            yield self.memories[index], nbytes


@dataclass
class Step:
    """All kernels of a step, and the memories that outlive it."""

    kernels: list[Kernel] = field(default_factory=list)
    kept: set[Memory] = field(default_factory=set)


def kernels_of(program: Program, batch: int, context: int) -> Step:
    """One new token for each of ``batch`` sequences; ``context`` rows are filled, the new one included."""
    walk = _Walk(StepSizes(program, batch, context))
    caches = {buffer.name for buffer in program.facts.buffers()}
    inputs = [walk.input(node, node.target in caches) for node in program.placeholders().values()]
    outputs = [value.memory for value in walk.graph(program.gm, inputs) if isinstance(value, Held)]
    for memory in outputs[1:]:
        memory.kind = Kind.CACHE  # a cache that grows is handed out anew, behind the logits
    walk.step.kept.update(outputs)
    return walk.step


class _Walk:
    """Goes through a graph in order and gives every node its value."""

    def __init__(self, sizes: StepSizes) -> None:
        self.step = Step()
        self._sizes = sizes
        self._weights: dict[int, Memory] = {}

    def input(self, node: Node, is_cache: bool) -> Held:
        layout = self._sizes.layout(node.meta["val"])
        return Held(layout, Memory(Kind.CACHE if is_cache else Kind.INPUT, layout.nbytes))

    def graph(self, module: GraphModule, inputs: Sequence[Any]) -> Any:
        values: dict[Node, Any] = {}
        unbound = iter(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(unbound)
            elif node.op == "get_attr":
                values[node] = self._attribute(operator.attrgetter(str(node.target))(module))
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], values.__getitem__)
            else:
                before = len(self.step.kernels)
                values[node] = self._value(node, values)
                made = self.step.kernels[before:]
                self.step.kernels[before:] = [replace(kernel, node=node) for kernel in made]
        return ()

    def _attribute(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()  # tied weights, and the parts of a packed one, share theirs
        memory = self._weights.setdefault(storage._cdata, Memory(Kind.WEIGHT, storage.nbytes()))
        return Held(Layout.of(value), memory)

    def _value(self, node: Node, values: dict[Node, Any]) -> Any:
        if (concat := Concat.of(node)) is not None and concat.joins_weights:
            layout = self._sizes.layout(node.meta["val"])
            return Held(layout, Memory(Kind.WEIGHT, layout.nbytes))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._wrapped(node, torch.fx.map_arg(node.args, values.__getitem__))
        if node.target is operator.getitem and isinstance(nest := values.get(node.all_input_nodes[0]), (list, tuple)):
            return nest[operator.index(node.args[1])]  # type: ignore[arg-type]
        operands: list[Held] = []
        args = self._layouts(node.args, values, operands)
        kwargs = {name: self._layouts(value, values, operands) for name, value in node.kwargs.items()}
        try:
            assert callable(node.target)
            done = call(node.target, args, kwargs)
        except Exception as error:
            log.debug("%s (%s) is counted as one kernel: %s", node, node.target, error)
            done = self._guess(node, operands)
        return self._placed(done, operands)

    def _wrapped(self, node: Node, args: Sequence[Any]) -> Any:
        """The body that a higher-order op wraps; nothing where it is not known which body runs, or how often."""
        bodies = [place for place, arg in enumerate(args) if isinstance(arg, GraphModule)]
        if len(bodies) == 1:
            body, operands = args[bodies[0]], args[bodies[0] + 1 :]
            if len(operands) == len(body.graph.find_nodes(op="placeholder")):
                return self.graph(body, operands)
        log.debug("%s (%s) is not counted: it wraps %d graphs", node, node.target, len(bodies))
        return self._placed(Call((), *_made(self._sizes, node, 0)), [])

    def _layouts(self, value: Any, values: dict[Node, Any], operands: list[Held]) -> Any:
        """Arguments with a layout for each tensor; the tensors go to ``operands``."""
        if isinstance(value, Node):
            value = values[value]
        if isinstance(value, Held):
            operands.append(value)
            return value.layout
        if isinstance(value, (list, tuple)):
            return [self._layouts(item, values, operands) for item in value]
        return self._sizes.number(value)

    def _guess(self, node: Node, operands: list[Held]) -> Call:
        """One kernel that reads what it is given and writes what the graph says it returns."""
        made, result = _made(self._sizes, node, len(operands))
        reads = [Part(index, operand.layout._replace(offset=0)) for index, operand in enumerate(operands)]
        writes = [leaf for leaf in pytree.tree_leaves(result, is_leaf=_is_part) if _is_part(leaf)]
        read, written = (tuple([Access(part, part.layout.nbytes) for part in parts]) for parts in (reads, writes))
        return Call((Launch(node.target, read, written),) if writes else (), made, result)

    def _placed(self, done: Call, operands: list[Held]) -> Any:
        memories = [*(held.memory for held in operands), *(Memory(Kind.ACTIVATION, n) for n in done.made)]
        offsets = [*(held.layout.offset for held in operands), *(0 for _ in done.made)]
        self.step.kernels += [Kernel(launch, memories, offsets) for launch in done.launches]

        def held(value: Any) -> Any:
            if isinstance(value, Part):
                index, layout = value
                return Held(layout._replace(offset=layout.offset + offsets[index]), memories[index])
            return [held(item) for item in value] if isinstance(value, (list, tuple)) else value

        return held(done.result)


def _made(sizes: StepSizes, node: Node, operands: int) -> tuple[tuple[int, ...], Any]:
    """What the graph says that a node returns, as memories of its own."""
    leaves, nesting = pytree.tree_flatten(node.meta.get("val"))
    layouts = [sizes.layout(leaf) if isinstance(leaf, Tensor) else sizes.number(leaf) for leaf in leaves]
    made: list[int] = []
    for place, layout in enumerate(layouts):
        if isinstance(layout, Layout):
            layouts[place] = Part(operands + len(made), layout)
            made.append(layout.nbytes)
    return tuple(made), pytree.tree_unflatten(layouts, nesting)


def _is_part(value: Any) -> bool:
    return isinstance(value, Part)
