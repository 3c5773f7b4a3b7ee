"""A graph that computes in one arena, by a plan made beforehand.

Every op writes into the place that the plan gave to its result. What the graph returns lies outside
of the arena and belongs to the caller. In ``mode="debug"`` every tensor has memory of its own and
nothing is computed in place; :func:`fxopt.shadow.shadow_replay` runs both side by side.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxopt.activation_plan import ActivationPlan, PlannedSet
from fxopt.arena_memory import Arena
from fxopt.errors import InvalidRequestError, warn
from fxopt.launches import Layout
from fxopt.liveness import Leaf
from fxopt.out_variants import writer

Mode = Literal["inference", "debug"]
MODES: tuple[str, ...] = ("inference", "debug")

Place: TypeAlias = "Tensor | Layout | None"  # in the arena; in new memory; or wherever the op itself puts it


@dataclass
class _Table:
    """Where every result goes at one set of shapes."""

    planned: PlannedSet
    places: dict[str, list[Place]]  # of the nodes that make memory
    generation: int = -1  # of the arena that the places are in


class ArenaModule(nn.Module):
    """Runs a graph in an arena; call it as the graph itself.

    Shapes that were not planned for are planned when they come; the arena grows if it must.
    ``stats`` counts runs, shapes that came unplanned, growths, and ops that needed memory of their own.
    """

    def __init__(
        self, gm: GraphModule, plan: ActivationPlan, mode: Mode = "inference", arena: Arena | None = None
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise InvalidRequestError(f"mode={mode!r} was asked for; there are {' and '.join(MODES)}")
        self.graph_module = gm
        self.plan = plan
        self.mode = mode
        self.stats: Counter[str] = Counter()
        self.arena = Arena(plan.device) if arena is None else arena
        self._tables = {_key(one.live.inputs): _Table(one, {}) for one in plan.sets}
        self._last_reads = _last_reads(gm)
        self._has_warned = False
        if mode == "inference":
            self.arena.reserve(plan.memory.arena)

    def forward(self, *inputs: Any) -> Any:
        with self.arena.lock, torch.no_grad():
            steps = self.steps(inputs)
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value

    def steps(self, inputs: Sequence[Any]) -> Generator[tuple[Node, Any], None, Any]:
        """Run, and stop after each op to show its result. Hold the arena's lock, and record no gradients."""
        places = self._places(inputs)
        values: dict[Node, Any] = {}
        unbound = iter(inputs)
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(unbound)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self.graph_module)
            elif node.op == "output":
                self.stats["runs"] += 1
                return torch.fx.map_arg(node.args[0], values.__getitem__)
            else:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = self._computed(node, places.get(node.name), args, kwargs)
                yield node, values[node]
                for dead in self._last_reads.get(node, ()):
                    del values[dead]
        return None

    def _computed(self, node: Node, places: list[Place] | None, args: Any, kwargs: Any) -> Any:
        assert callable(node.target)
        if places is None:  # a view, a number, or a write into what is there
            return node.target(*args, **kwargs)
        write = writer(node.target)
        if write is not None and None not in places:
            results = [_new(place) for place in places if place is not None]
            write(results, args, kwargs)
            return results[0] if len(results) == 1 else tuple(results)
        self.stats[f"own memory: {node.target}"] += 1
        leaves, nesting = pytree.tree_flatten(node.target(*args, **kwargs))
        kept = [
            place.copy_(leaf) if isinstance(place, Tensor) else leaf for place, leaf in zip(places, leaves, strict=True)
        ]
        return pytree.tree_unflatten(kept, nesting)

    def _places(self, inputs: Sequence[Any]) -> dict[str, list[Place]]:
        layouts = [Layout.of(value) if isinstance(value, Tensor) else None for value in inputs]
        table = self._tables.get(_key(layouts)) or self._late(layouts)
        if table.generation != self.arena.generation:
            table.places = dict(self._laid_out(table.planned))
            table.generation = self.arena.generation
        return table.places

    def _late(self, layouts: Sequence[Layout | None]) -> _Table:
        """A plan for shapes that nobody named."""
        self.stats["shapes planned late"] += 1
        found = self.plan.late(self.graph_module, layouts)
        table = self._tables[_key(layouts)] = _Table(found, {})
        if self.mode == "inference" and found.plan.size > self.arena.nbytes:
            self.stats["arena grown"] += 1
            if not self._has_warned:
                self._has_warned = True
                warn(
                    f"a run at {_shapes(layouts)} needs an arena of {found.plan.size:,} bytes, but "
                    f"{self.arena.nbytes:,} were planned; it grows now. Name the largest shapes in shape_sets "
                    "to have all memory from the start"
                )
            self.arena.reserve(found.plan.size)
        return table

    def _laid_out(self, one: PlannedSet) -> dict[str, list[Place]]:
        makers = {storage.node for storage in one.live.storages.values() if storage.kind != "workspace"}
        return {node: [self._place(node, leaf, one) for leaf in one.live.leaves[node]] for node in makers}

    def _place(self, node: str, leaf: Leaf | None, one: PlannedSet) -> Place:
        storage = one.live.storages.get(leaf.storage or "") if leaf is not None else None
        if leaf is None or storage is None or storage.node != node or _overlaps_itself(leaf.layout):
            return None
        slot = one.live.slot(storage.name)
        if self.mode == "inference" and slot in one.live.placed and storage.nbytes:
            return self.arena.view(one.plan.offsets[slot], leaf.layout)
        parts = [other for other in one.live.leaves[node] if other is not None and other.storage == storage.name]
        return leaf.layout if len(parts) == 1 and leaf.layout.offset == 0 else None


def _new(place: Tensor | Layout) -> Tensor:
    if isinstance(place, Tensor):
        return place
    return torch.empty_strided(place.sizes, place.strides, dtype=place.dtype, device=place.device)


def _key(inputs: Sequence[Layout | None]) -> Hashable:
    """Equal for inputs of the same shapes and dtypes."""
    return tuple(None if layout is None else (layout.sizes, layout.dtype) for layout in inputs)


def _shapes(inputs: Sequence[Layout | None]) -> str:
    return ", ".join(str(list(layout.sizes)) for layout in inputs if layout is not None)


def _overlaps_itself(layout: Layout) -> bool:
    """Whether elements share memory, as after an expand: nothing can be written there."""
    return any(size > 1 and not stride for size, stride in zip(layout.sizes, layout.strides, strict=True))


def _last_reads(gm: GraphModule) -> dict[Node, list[Node]]:
    """The values that each call is the last to read; what nobody reads goes as it is made."""
    found: dict[Node, list[Node]] = {}
    read: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function":
            found[node] = [value for value in (node, *node.all_input_nodes) if value not in read]
        read.update((node, *node.all_input_nodes))
    return found
