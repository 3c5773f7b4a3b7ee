"""A graph from plain data that anybody may have written.

PyTorch writes Python code from a graph and runs it, so every name that could end up there is
checked: nodes, inputs, weights and keywords are identifiers, operators come from one list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.artifact.operators import WORDS, operator_of
from fxopt.artifact.plain import device_of, dtype_of, expect, from_plain, wrong
from fxopt.errors import ArtifactError
from fxopt.program import Facts, Program
from fxopt.propagate import propagate
from fxopt.symbols import expression, fresh_size
from fxopt.views import arguments, memory_of, mutated_arguments

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_PLACE = re.compile(r"[\w.\-\[\]() ]{0,300}")
_SOURCE = re.compile(r"[\w.\-]{1,100}:\d{1,7}")
_FORMATS = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}


@dataclass(frozen=True)
class Input:
    """What one placeholder takes; a size is a number or the name of one."""

    dtype: torch.dtype
    shape: tuple[Any, ...]
    stride: tuple[Any, ...] | None


@dataclass
class Draft:
    """A graph that is checked, but has no weights and knows no shapes."""

    graph: Graph
    sizes: dict[str, int]
    inputs: dict[Node, Input]

    @property
    def weights(self) -> list[str]:
        return list(dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "get_attr"))

    def program(self, weights: Mapping[str, Tensor], facts: Facts) -> Program:
        """The graph on these weights, with the fake value of every node computed anew."""
        module = GraphModule({name: weights[name] for name in self.weights}, self.graph, class_name="CausalLM")
        program = Program(module, facts, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False))
        sizes = {name: fresh_size(program.shape_env, name, hint) for name, hint in self.sizes.items()}
        inputs = {node.name: one for node, one in self.inputs.items()}
        with program.fake_mode:
            for name, node in program.placeholders().items():
                one = inputs[name]
                value = torch.empty([sizes.get(s, s) for s in one.shape], dtype=one.dtype, device=facts.device)
                if one.stride is not None:
                    value = value.as_strided(value.shape, [sizes.get(s, s) for s in one.stride])
                node.meta["val"] = value
        propagate(program)
        check_views(program)
        program.output().meta["val"] = tuple(node.meta["val"] for node in program.results())
        return program


def check_views(program: Program) -> None:
    """``as_strided`` may show a whole tensor in another shape, and no memory beside it."""
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.as_strided.default:
            continue
        whole, view = arguments(node)["self"].meta["val"], node.meta["val"]
        same_size = sympy.expand(_count(whole) - _count(view)) == 0
        if arguments(node)["storage_offset"] not in (None, 0) or not (same_size and _dense(whole) and _dense(view)):
            raise ArtifactError(f"{node} reads memory by strides of its own, which a saved graph may not do")


def _count(tensor: Tensor) -> sympy.Expr:
    return sympy.Mul(*(expression(size) for size in tensor.shape))


def _dense(tensor: Tensor) -> bool:
    """Whether the numbers lie one behind the other, for every length."""
    step: sympy.Expr = sympy.Integer(1)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if size != 1 and sympy.expand(expression(stride) - step) != 0:
            return False
        step *= expression(size)
    return True


def read_graph(data: Any, device: torch.device, where: str) -> Draft:
    """Check a graph from a file and build it."""
    table = expect(dict, data, where)
    reader = _Reader(device, from_plain(dict[str, int], table.get("sizes"), f"{where}.sizes"), where)
    for number, node in enumerate(expect(list, table.get("nodes"), f"{where}.nodes")):
        reader.add(expect(dict, node, f"{where}.nodes[{number}]"))
    results = reader.value(table.get("results"), f"{where}.results")
    if not isinstance(results, (tuple, list)) or not all(isinstance(one, Node) for one in results):
        wrong(f"{where}.results", "a list of nodes", table.get("results"))
    reader.graph.output(results)
    reader.graph.lint()
    return Draft(reader.graph, reader.sizes, reader.inputs)


class _Reader:
    def __init__(self, device: torch.device, sizes: dict[str, int], where: str) -> None:
        self.graph = Graph()
        self.inputs: dict[Node, Input] = {}
        self.sizes = sizes
        self._device = device
        self._nodes: list[Node] = []
        self._names: set[str] = set()
        self._where = where
        for name, hint in sizes.items():
            if not _NAME.fullmatch(name) or not 2 <= hint < 2**31:
                wrong(f"{where}.sizes.{name[:40]}", "a size of two or more under a plain name", hint)

    def add(self, data: dict[str, Any]) -> None:
        where = f"{self._where}.nodes[{len(self._nodes)}]"
        name = _matching(_NAME, data.get("name"), f"{where}.name")
        if name in self._names:
            wrong(f"{where}.name", "a name of its own", name)
        if "input" in data:
            if any(node.op != "placeholder" for node in self._nodes):
                raise ArtifactError(f"{where} is an input behind a call; the file is damaged or was edited")
            node = self.graph.placeholder(name)
            self.inputs[node] = self._input(data["input"], f"{where}.input")
        elif "weight" in data:
            target = _matching(_PATH, data["weight"], f"{where}.weight")
            node = self.graph.create_node("get_attr", target, name=name)
        else:
            node = self._call(name, data, where)
        if node.name != name:
            wrong(f"{where}.name", "a name that no function of Python has", name)
        self._names.add(name)
        self._nodes.append(node)
        _set_origin(node, data, where)

    def value(self, data: Any, where: str) -> Any:
        """One argument, from what ``graph_write`` made of it."""
        if isinstance(data, list):
            return [self.value(item, where) for item in data]
        if isinstance(data, str) and data not in WORDS:
            wrong(where, "one of the words that operators take", data)
        if not isinstance(data, dict):
            return data
        if len(data) != 1:
            wrong(where, "a table with one key", data)
        [(kind, content)] = data.items()
        if kind not in self._READERS:
            wrong(where, "an argument", data)
        return self._READERS[kind](self, content, where)

    def _node(self, number: Any, where: str) -> Node:
        place = expect(int, number, where)
        if not 0 <= place < len(self._nodes):
            wrong(where, "the number of an earlier node", number)
        return self._nodes[place]

    def _tuple(self, items: Any, where: str) -> tuple[Any, ...]:
        return tuple(self.value(item, where) for item in expect(list, items, where))

    def _device_(self, name: Any, where: str) -> torch.device:
        return self._device if name == "model" else device_of(name, where)

    def _float(self, name: Any, where: str) -> float:
        return float(name) if name in ("inf", "-inf", "nan") else wrong(where, "inf or nan", name)

    def _layout(self, name: Any, where: str) -> torch.layout:
        return torch.strided if name == "strided" else wrong(where, "strided", name)

    def _memory_format(self, name: Any, where: str) -> torch.memory_format:
        return _FORMATS[name] if name in _FORMATS else wrong(where, "a memory format", name)

    def _dtype(self, name: Any, where: str) -> torch.dtype:
        return dtype_of(name, where)

    _READERS: Mapping[str, Callable[[_Reader, Any, str], Any]] = {
        "node": _node,
        "tuple": _tuple,
        "device": _device_,
        "float": _float,
        "layout": _layout,
        "memory_format": _memory_format,
        "dtype": _dtype,
    }

    def _input(self, data: Any, where: str) -> Input:
        table = expect(dict, data, where)
        shape = self._sizes(table.get("shape"), f"{where}.shape")
        stride = self._sizes(table["stride"], f"{where}.stride") if "stride" in table else None
        if stride is not None and len(stride) != len(shape):
            wrong(f"{where}.stride", f"{len(shape)} numbers", table["stride"])
        return Input(dtype_of(table.get("dtype"), f"{where}.dtype"), shape, stride)

    def _sizes(self, data: Any, where: str) -> tuple[Any, ...]:
        sizes = expect(list, data, where)
        for size in sizes:
            known = type(size) is int and 0 <= size < 2**40
            if not known and not (isinstance(size, str) and size in self.sizes):
                wrong(where, "sizes", data)
        return tuple(sizes)

    def _call(self, name: str, data: dict[str, Any], where: str) -> Node:
        target = operator_of(expect(str, data.get("call"), f"{where}.call"))
        args = self.value(expect(list, data.get("args"), f"{where}.args"), f"{where}.args")
        kwargs = expect(dict, data.get("kwargs", {}), f"{where}.kwargs")
        known = {p.name for p in target._schema.arguments} if isinstance(target, torch._ops.OpOverload) else set()
        if strange := kwargs.keys() - known:
            wrong(f"{where}.kwargs", f"arguments of {target}", sorted(map(str, strange))[0])
        named = {key: self.value(item, f"{where}.kwargs.{key}") for key, item in kwargs.items()}
        node = self.graph.create_node("call_function", target, tuple(args), named, name=name)
        self._check_writes(node, where)
        return node

    def _check_writes(self, node: Node, where: str) -> None:
        try:
            written = [memory_of(tensor) for tensor in mutated_arguments(node)]
        except (KeyError, TypeError, AttributeError):
            wrong(where, "a call that fits its operator", node.target)
        if any(memory.op == "get_attr" for memory in written):
            raise ArtifactError(f"{where} writes into a weight of the model; a file may not do that")


def _matching(pattern: re.Pattern[str], data: Any, where: str) -> str:
    text = expect(str, data, where)
    return text if pattern.fullmatch(text) else wrong(where, "a plain name", data)


def _set_origin(node: Node, data: dict[str, Any], where: str) -> None:
    """What reports tell about a node: the layer, the line of the model's code, the passes."""
    if "path" in data:
        path = _matching(_PLACE, data["path"], f"{where}.path")
        node.meta["nn_module_stack"] = {"L__self__": (path, "")}
    if "source" in data:
        file, line = _matching(_SOURCE, data["source"], f"{where}.source").rsplit(":", 1)
        node.meta["stack_trace"] = f'File "{file}", line {line}'
    if "made_by" in data:
        makers = expect(list, data["made_by"], f"{where}.made_by")
        node.meta["fxopt"] = tuple(_matching(_NAME, maker, f"{where}.made_by") for maker in makers)
