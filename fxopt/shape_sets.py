"""The shapes that a graph will run at: a number for each of its sizes that varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from fxopt.errors import InvalidRequestError
from fxopt.launches import Layout, dense_where_single
from fxopt.program import ATTENTION_MASK, INPUT_IDS, LOGIT_POSITIONS, WINDOW, Program, key_name, whole_windows
from fxopt.symbols import expression

ShapeSet = Mapping[str, int]  # {"batch": 1, "step": 256, "window": 1216}

#: The inputs that sizes are read from, and what each size is called.
_AXES = (
    (INPUT_IDS, 0, "batch"),
    (INPUT_IDS, 1, "step"),
    (LOGIT_POSITIONS, 0, "logits"),
    (key_name(0), 2, "past"),
    (ATTENTION_MASK, 1, "window"),
)
WINDOWS = 4  # of a decode graph that are planned ahead: a quarter of the rows, half of them …


class Axes:
    """The named sizes of a program."""

    def __init__(self, program: Program) -> None:
        inputs = program.placeholders()
        self._sizes: dict[str, sympy.Expr] = {
            axis: sympy.sympify(expression(inputs[name].meta["val"].shape[dim]))
            for name, dim, axis in _AXES
            if name in inputs
        }
        symbols: dict[sympy.Symbol, str] = {}
        for axis, size in self._sizes.items():
            if isinstance(size, sympy.Symbol):
                symbols.setdefault(size, axis)
        self._named = {symbol: sympy.Symbol(axis, integer=True, positive=True) for symbol, axis in symbols.items()}

    @property
    def free(self) -> tuple[str, ...]:
        """The axes that a shape set must give a number for."""
        return tuple(symbol.name for symbol in self._named.values())

    def bound(self, axis: str) -> int | None:
        """The number that the graph itself has for an axis, if it has one."""
        size = self._sizes.get(axis)
        return int(size) if size is not None and size.is_number else None

    def named(self, size: Any) -> sympy.Expr:
        """A size as an expression in the names of the axes."""
        return sympy.sympify(expression(size)).xreplace(self._named)

    def read(self, inputs: Mapping[str, Sequence[int]]) -> ShapeSet:
        """The shape set in which the inputs have these shapes."""
        found: dict[str, int] = {}
        for name, dim, axis in _AXES:
            if axis in self.free and dim < len(inputs.get(name, ())):
                found[axis] = inputs[name][dim]
        return found

    def numbers(self, shapes: ShapeSet) -> Numbers:
        """Numbers for every size; a sentence if ``shapes`` does not fit the graph."""
        if missing := [axis for axis in self.free if axis not in shapes]:
            raise InvalidRequestError(
                f"the shape set {dict(shapes)} has no {' and no '.join(missing)}; "
                f"this graph needs a number for each of {', '.join(self.free)}"
            )
        if wrong := [axis for axis, number in shapes.items() if type(number) is not int or number < 1]:
            raise InvalidRequestError(f"{wrong[0]}={shapes[wrong[0]]!r} is no size; give a whole number from 1")
        found = Numbers({symbol: sympy.Integer(shapes[name.name]) for symbol, name in self._named.items()})
        for axis, number in shapes.items():
            if axis not in self._sizes:
                raise InvalidRequestError(f"{axis}={number}: the graph has no {axis}; it has {', '.join(self._sizes)}")
            if (holds := found.of_expression(self._sizes[axis])) != number:
                raise InvalidRequestError(f"{axis}={number} was asked for, but in this graph it is {holds}")
        return found


class Numbers:
    """Numbers for the symbols of a graph. What is asked twice is computed once: sympy is slow."""

    def __init__(self, known: Mapping[sympy.Symbol, sympy.Integer]) -> None:
        self._known = known
        self._found: dict[sympy.Expr, int] = {}

    @property
    def by_symbol(self) -> dict[str, int]:
        """The number of each symbol, by the name that it has in the graph."""
        return {str(symbol): int(number) for symbol, number in self._known.items()}

    def of(self, size: Any) -> int:
        return size if isinstance(size, int) else self.of_expression(size.node.expr)

    def of_expression(self, size: sympy.Expr) -> int:
        if size not in self._found:
            value = size.xreplace(self._known)
            if not value.is_number:
                raise InvalidRequestError(f"the size {size} depends on data, and nothing can be planned ahead for it")
            self._found[size] = int(value)
        return self._found[size]

    def layout(self, tensor: torch.Tensor) -> Layout:
        sizes, strides = (tuple(map(self.of, numbers)) for numbers in (tensor.shape, tensor.stride()))
        return Layout(sizes, dense_where_single(sizes, strides), 0, tensor.dtype, tensor.device)


def examples(program: Program, shapes: ShapeSet, module: GraphModule | None = None) -> list[Layout]:
    """What the inputs of a program look like, or those of a piece that was cut out of it."""
    numbers = Axes(program).numbers(shapes)
    graph = (module or program.gm).graph
    return [numbers.layout(node.meta["val"]) for node in graph.find_nodes(op="placeholder")]


def shapes_of_inputs(program: Program, shapes: ShapeSet) -> dict[str, list[int]]:
    """The shapes of those inputs whose shapes vary: what people call a set."""
    numbers = Axes(program).numbers(shapes)
    return {
        name: [numbers.of(size) for size in node.meta["val"].shape]
        for name, node in program.placeholders().items()
        if any(isinstance(size, torch.SymInt) for size in node.meta["val"].shape)
    }


def default_shape_sets(program: Program, chunk: int = 256, batch: int = 1, logits: int = 1) -> list[ShapeSet]:
    """A first and a last chunk for a graph that takes many tokens; some windows for one that takes one."""
    axes, facts = Axes(program), program.facts
    step = min(chunk, facts.max_len) if "step" in axes.free else axes.bound("step") or 1
    windows: Sequence[int] = (facts.capacity,)
    if "past" in axes.free:
        windows = (step, facts.max_len)
    elif "window" in axes.free and step > 1:
        windows = (min(whole_windows(step), facts.capacity), facts.capacity)
    elif "window" in axes.free:
        windows = [max(WINDOW, whole_windows(facts.capacity * part // WINDOWS)) for part in range(1, WINDOWS + 1)]
        windows = [min(window, facts.capacity) for window in windows]
    found: list[ShapeSet] = []
    for window in dict.fromkeys(windows):
        sizes = {"batch": batch, "step": step, "past": max(1, window - step), "window": window}
        sizes["logits"] = min(logits, step)
        found.append({axis: sizes[axis] for axis in axes.free})
    return found


def sets_by_graph(shapes: Any, graphs: Sequence[str]) -> dict[str, tuple[ShapeSet, ...]]:
    """Sets of shapes for some of these graphs, if that is what was given."""
    form = 'give sets by graph, such as {"prefill": [{"step": 64}]}'
    if not isinstance(shapes, Mapping):
        raise InvalidRequestError(f"the shapes {shapes!r} are no mapping; {form}")
    found: dict[str, tuple[ShapeSet, ...]] = {}
    for name, sets in shapes.items():
        if name not in graphs:
            raise InvalidRequestError(f"there is no graph {name!r} to plan; there are {', '.join(graphs)}")
        is_list = isinstance(sets, Sequence) and not isinstance(sets, str)
        if not is_list or not all(isinstance(each, Mapping) for each in sets):
            raise InvalidRequestError(f"the shapes of {name} are {sets!r}, which is no list of sets; {form}")
        found[name] = tuple(dict(each) for each in sets)
    return found


def full_sets(
    graph: str, program: Program, asked: Sequence[ShapeSet], chunk: int = 256, batch: int = 1, logits: int = 1
) -> tuple[ShapeSet, ...]:
    """Every set with a number for each axis: what it leaves out is as in the largest of the usual sets.

    Those are what a graph without sets has. ``graph`` is its name, for sentences.
    """
    usual = default_shape_sets(program, chunk, batch, logits)
    if not asked:
        return tuple(usual)
    axes = Axes(program)
    found = []
    for each in asked:
        full = {axis: each.get(axis, size) for axis, size in usual[-1].items()}
        if "window" in each and "step" in full and "step" not in each and type(each["window"]) is int:
            full["step"] = min(full["step"], each["window"])
        try:
            axes.numbers({**full, **each})
            _check_room(program, full, axes)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{graph}: {error}") from None
        found.append(full)
    return tuple(found)


def _check_room(program: Program, shapes: ShapeSet, axes: Axes) -> None:
    """Raise a sentence for sizes that the graph would take, and the engine never gives."""
    facts = program.facts
    rows = shapes.get("window", facts.capacity)
    if rows > facts.capacity:
        raise InvalidRequestError(
            f"window={rows} is more than the {facts.capacity} rows that the cache has at max_len={facts.max_len}"
        )
    step = shapes.get("step", 1)
    if "step" in axes.free and step == 1:
        raise InvalidRequestError("step=1: this graph takes two tokens or more at once; the decode graph takes one")
    if step > rows:
        raise InvalidRequestError(f"step={step} is more than the {rows} rows of the window, of which they are part")
