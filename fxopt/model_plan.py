"""The memory plans of the graphs of a model, which run one at a time and so in one arena: table, files, pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tabulate import tabulate

from fxopt.activation_dag import FILE, activation_dag, dump
from fxopt.activation_plan import ActivationPlan
from fxopt.errors import InvalidRequestError
from fxopt.memory import draw_beside, plan
from fxopt.memory.planner import Solver, Status
from fxopt.memory.sets import Merge
from fxopt.plan_captions import by_operator, captions
from fxopt.program import Program
from fxopt.shape_sets import ShapeSet

#: What others would need, by the names that people know them by.
OTHERS: dict[str, Solver] = {
    "nothing shared": "naive",
    "itrex": "itrex",
    "TFLite greedy": "tflite",
    "ExecuTorch greedy": "executorch",
}


class Bounded(Protocol):
    """A plan, or several in one arena."""

    @property
    def lower_bound(self) -> int: ...
    @property
    def status(self) -> Status: ...
    @property
    def gap(self) -> float: ...


@dataclass(frozen=True)
class GraphPlan:
    """One graph of a model, the shapes that it was planned for, and the plan."""

    name: str
    program: Program
    shapes: tuple[ShapeSet, ...]
    activations: ActivationPlan
    seconds: float

    @property
    def arena(self) -> int:
        """The bytes that hold whichever of the shapes is running."""
        return self.activations.memory.arena

    def picture(self, title: str) -> str:
        """The shapes that need most: the greedy over shared blocks beside the plan, as SVG."""
        sets = self.activations.sets
        number = max(range(len(sets)), key=lambda number: sets[number].plan.lower_bound)
        made, live = by_operator(self.program.gm, sets[number].plan), sets[number].live
        said = ", ".join(filter(None, [title, self.name, _words(self.shapes[number])]))
        beside = [("Greedy by size over shared blocks", plan(made.problem, "itrex")), ("This plan", made)]
        return draw_beside(beside, said, captions(self.program.gm, live))


@dataclass(frozen=True)
class ModelPlan:
    """The plans of some graphs of a model."""

    model: str
    max_len: int
    dtype: str
    merge: Merge
    graphs: tuple[GraphPlan, ...]

    @property
    def arena(self) -> int:
        """The bytes in which all graphs run, one at a time."""
        return max(graph.arena for graph in self.graphs)

    @property
    def lower_bound(self) -> int:
        """The most bytes that the largest graph needs at once."""
        return max(graph.activations.memory.lower_bound for graph in self.graphs)

    @property
    def proven(self) -> int:
        """No arena for all graphs is smaller."""
        return max(graph.activations.memory.proven for graph in self.graphs)

    @property
    def status(self) -> Status:
        return "optimal" if self.arena <= self.proven else "feasible"

    @property
    def gap(self) -> float:
        return self.arena / self.proven - 1 if self.proven else 0.0

    def __getitem__(self, name: str) -> GraphPlan:
        """A graph by its name."""
        known = {graph.name: graph for graph in self.graphs}
        if name not in known:
            raise InvalidRequestError(f"no graph {name!r} was planned; there are {', '.join(known)}")
        return known[name]

    def __str__(self) -> str:
        headers = ["graph", "shapes"]
        notes = {one.note: None for graph in self.graphs for one in graph.activations.memory.plans if one.note}
        parts = [
            f"{self.model}, max_len {self.max_len}, {self.dtype}, merge {self.merge}; sizes in bytes",
            _table([*headers, "buffers", "lower bound", "arena", "ratio", "status", "seconds"], self._plans()),
            "What others would need:",
            _table([*headers, *OTHERS], self._others()),
        ]
        return "\n\n".join([*parts, *notes])

    def dump(self, path: str | Path = FILE) -> list[Path]:
        """Write what :func:`fxopt.activation_dag.load` reads; several graphs have a file each."""
        return self._each(path, lambda graph, to: dump(activation_dag(graph.program.gm, graph.activations), to))

    def draw(self, path: str | Path) -> list[Path]:
        """Write the picture of each graph."""

        def drawn(graph: GraphPlan, to: Path) -> Path:
            to.write_text(graph.picture(self.model), encoding="utf-8")
            return to

        return self._each(path, drawn)

    def _each(self, path: str | Path, write: Callable[[GraphPlan, Path], Path]) -> list[Path]:
        whole = Path(path)
        if len(self.graphs) == 1:
            return [write(self.graphs[0], whole)]
        return [write(graph, whole.with_name(f"{whole.stem}.{graph.name}{whole.suffix}")) for graph in self.graphs]

    def _plans(self) -> list[list[object]]:
        rows: list[list[object]] = []
        for graph in self.graphs:
            memory = graph.activations.memory
            for shapes, one in zip(graph.shapes, memory.plans, strict=True):
                buffers = len(one.problem.placed)
                rows.append([graph.name, _words(shapes), buffers, *_judged(one, one.size), None])
            if len(memory.plans) > 1:
                rows.append([graph.name, "all of these", None, *_judged(memory, memory.arena), None])
            rows[-1][-1] = graph.seconds
        if len(self.graphs) > 1:
            took = sum(graph.seconds for graph in self.graphs)
            rows.append(["all graphs", "in one arena", None, *_judged(self, self.arena), took])
        return rows

    def _others(self) -> list[list[object]]:
        rows: list[list[object]] = []
        every: list[list[int]] = []
        for graph in self.graphs:
            memory = graph.activations.memory
            sizes = [[plan(one.problem, solver).size for solver in OTHERS.values()] for one in memory.plans]
            for shapes, found in zip(graph.shapes, sizes, strict=True):
                rows.append([graph.name, _words(shapes), *found])
            if len(memory.plans) > 1:
                rows.append([graph.name, "all of these", *map(max, zip(*sizes, strict=True))])
            every += sizes
        if len(self.graphs) > 1:
            rows.append(["all graphs", "in one arena", *map(max, zip(*every, strict=True))])
        return rows


def quality(of: Bounded) -> str:
    """Whether a plan is known to be the smallest, or how far from that it may be."""
    return of.status if of.status == "optimal" else f"feasible, at most {of.gap:.2%} too large"


def ratio(size: int, bound: int) -> float:
    return size / bound if bound else 1.0


def _judged(of: Bounded, size: int) -> list[object]:
    return [of.lower_bound, size, ratio(size, of.lower_bound), quality(of)]


def _table(headers: list[str], rows: list[list[object]]) -> str:
    """Rows of one graph have its name once."""
    names = ["", *(row[0] for row in rows)]
    shown = [["" if row[0] == before else row[0], *row[1:]] for before, row in zip(names, rows, strict=False)]
    digits = [".4f" if header == "ratio" else ".2f" for header in headers]
    return tabulate(shown, headers=headers, tablefmt="simple", intfmt=",", floatfmt=digits)


def _words(shapes: ShapeSet) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in shapes.items())
