"""Which memory the calls of a graph make, and from when until when each is needed.

The graph is run once more on fake tensors with numbers for sizes. Two tensors share memory when
their storages are one there: views and ops that may copy are told apart by what they do, not by
their names. ``meta["val"]`` cannot say it, since nodes with like values may share one object.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxopt.aliases import MemoryClasses, promised_aliases, tensors
from fxopt.errors import InvalidRequestError, first_line
from fxopt.launches import Layout
from fxopt.memory.problem import ALIGN, Buffer, Problem

log = logging.getLogger("fxopt")

Kind = Literal["activation", "output", "workspace"]

_ALIGN = {"cuda": 512}  # as PyTorch's own allocator aligns there


@dataclass(frozen=True)
class Storage:
    """Memory that a call makes: needed from step ``start`` up to, and without, step ``end``."""

    name: str
    node: str
    kind: Kind
    start: int
    end: int
    nbytes: int
    device: torch.device


@dataclass(frozen=True)
class Leaf:
    """A tensor: how it lies, and in which storage; None for weights, inputs and their views."""

    layout: Layout
    storage: str | None


@dataclass(frozen=True)
class Liveness:
    """All tensors of a graph at one set of shapes."""

    inputs: tuple[Layout | None, ...]
    storages: Mapping[str, Storage]
    leaves: Mapping[str, tuple[Leaf | None, ...]]  # of every node; None for what is no tensor
    in_place: Mapping[str, str] = field(default_factory=dict)  # storages that take the place of one that dies

    def slot(self, storage: str) -> str:
        """The storage in whose place this one lies in the end: its own, unless it is computed in place."""
        while storage in self.in_place:
            storage = self.in_place[storage]
        return storage

    @cached_property
    def device(self) -> torch.device:
        """Where most of the memory is; what lies elsewhere is not planned."""
        held: Counter[torch.device] = Counter()
        for storage in self.storages.values():
            held[storage.device] += storage.nbytes
        return held.most_common(1)[0][0] if held else torch.device("cpu")

    @cached_property
    def placed(self) -> Mapping[str, tuple[Storage, ...]]:
        """The storages of every place in the arena. Outputs have none: they must outlive the next run."""
        found: defaultdict[str, list[Storage]] = defaultdict(list)
        for storage in self.storages.values():
            if storage.kind != "output" and storage.device == self.device:
                found[self.slot(storage.name)].append(storage)
        return {slot: tuple(held) for slot, held in found.items()}

    @cached_property
    def problem(self) -> Problem:
        """What a planner has to place."""
        align = _ALIGN.get(self.device.type, ALIGN)
        return Problem(
            Buffer(slot, held[0].start, held[-1].end, held[0].nbytes, align, held[0].kind)
            for slot, held in self.placed.items()
        )


def liveness(gm: GraphModule, inputs: Sequence[Layout | None]) -> Liveness:
    """The memory of a graph whose inputs look like this; None stands for an input that is no tensor."""
    wanted = len(gm.graph.find_nodes(op="placeholder"))
    if len(inputs) != wanted:
        raise InvalidRequestError(f"this graph has {wanted} inputs, and {len(inputs)} were described")
    walk = _Walk()
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(), enable_python_dispatcher():
        results = walk.run(gm, [None if layout is None else _fake(layout) for layout in inputs])
        walk.outputs(results)
        return Liveness(tuple(inputs), walk.storages(), walk.leaves())


def _fake(layout: Layout) -> Tensor:
    return torch.empty_strided(layout.sizes, layout.strides, dtype=layout.dtype, device=layout.device)


@dataclass
class _Made:
    name: str
    node: str
    start: int
    last: int
    storage: torch.UntypedStorage
    device: torch.device
    kind: Kind = "activation"


class _Walk:
    """Runs a graph on fake tensors and follows every storage."""

    def __init__(self) -> None:
        self._values: dict[Node, Any] = {}
        self._classes = MemoryClasses()
        self._made: dict[int, _Made] = {}  # by class
        self._workspaces: list[Storage] = []
        self._steps = 0

    def run(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        """What the graph returns."""
        unbound = iter(inputs)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(unbound)
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(gm)
                self._values[node] = _fake(Layout.of(value)) if isinstance(value, Tensor) else value
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], self._values.__getitem__)
            else:
                self._call(node)
        return ()

    def outputs(self, results: Any) -> None:
        """What the graph returns lives to the end."""
        for tensor in tensors(results):
            if (made := self._made_of(tensor)) is not None:
                made.kind, made.last = "output", self._steps - 1

    def storages(self) -> dict[str, Storage]:
        found = [
            Storage(made.name, made.node, made.kind, made.start, made.last + 1, made.storage.nbytes(), made.device)
            for made in self._made.values()
        ]
        return {storage.name: storage for storage in sorted([*found, *self._workspaces], key=lambda s: s.start)}

    def leaves(self) -> dict[str, tuple[Leaf | None, ...]]:
        return {
            node.name: tuple(self._leaf(value) for value in pytree.tree_leaves(values))
            for node, values in self._values.items()
        }

    def _leaf(self, value: Any) -> Leaf | None:
        if not isinstance(value, Tensor):
            return None
        made = self._made_of(value)
        return Leaf(Layout.of(value), None if made is None else made.name)

    def _made_of(self, tensor: Tensor) -> _Made | None:
        return self._made.get(self._classes.of(tensor))

    def _call(self, node: Node) -> None:
        step, self._steps = self._steps, self._steps + 1
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        assert callable(node.target)
        try:
            self._values[node] = result = node.target(*args, **kwargs)
        except Exception as error:
            raise InvalidRequestError(
                f"the memory of this graph cannot be planned: {node} ({node.target}) has no result that is known "
                f"from shapes alone ({type(error).__name__}: {first_line(error)})"
            ) from error
        read = tensors(result if node.target is operator.getitem else (args, kwargs))  # of many, it reads one
        for tensor in read:
            if (made := self._made_of(tensor)) is not None:
                made.last = step
        if node.target is operator.getitem:
            return
        known = {self._classes.of(tensor) for tensor in read}
        for operand, returned in promised_aliases(node, args, kwargs, result):
            self._classes.join(operand, returned)
        for number, tensor in enumerate(pytree.tree_leaves(result)):
            if isinstance(tensor, Tensor) and self._classes.of(tensor) not in known and self._made_of(tensor) is None:
                name = node.name if isinstance(result, Tensor) else f"{node.name}.{number}"
                made = _Made(name, node.name, step, step, tensor.untyped_storage(), tensor.device)
                self._made[self._classes.of(tensor)] = made
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._charge(node, step, args)

    def _charge(self, node: Node, step: int, args: Sequence[Any]) -> None:
        """The bodies of control flow work in memory of their own, one body at a time."""
        bodies = {place: arg for place, arg in enumerate(args) if isinstance(arg, GraphModule)}
        operands = [Layout.of(tensor) for tensor in tensors(args[max(bodies, default=-1) + 1 :])]
        needed = max((_body_bytes(node, body, operands) for body in bodies.values()), default=0)
        if needed:
            device = operands[0].device if operands else torch.device("cpu")
            name = f"{node.name}.workspace"
            self._workspaces.append(Storage(name, node.name, "workspace", step, step + 1, needed, device))


def _body_bytes(node: Node, body: GraphModule, operands: Sequence[Layout]) -> int:
    """The most that a body needs at once, apart from what it returns."""
    try:
        return liveness(body, operands).problem.lower_bound
    except Exception as error:
        log.debug("%s (%s): the memory of a body is not counted: %s", node, node.target, error)
        return 0
