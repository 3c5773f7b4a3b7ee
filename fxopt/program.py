"""The graph that passes rewrite, together with the facts about it that they may rely on.

Legend for shapes: B batch, S step (tokens fed at once), P past tokens, N window (rows of the
cache that attention reads), H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.kv_formats import FORMATS, NOW, FormatName, KVFormat, Part, Run, turned
from fxopt.timed_forms import TimedForms
from fxopt.weight_formats import CodedWeight, WeightFormatName

INPUT_IDS = "input_ids"  # [B, S]
ATTENTION_MASK = "attention_mask"  # [B, N], 1 where a row of the cache may be attended to
POSITION_IDS = "position_ids"  # [B, S]
CACHE_POSITION = "cache_position"  # [S], the rows of the cache that this step writes
LOGIT_POSITIONS = "logit_positions"  # [K], the steps whose logits are asked for


DEEP = 4  # layers from which on compiling one of them is quicker than compiling all as one
WINDOW = 64  # attention reads multiples of this many rows


def whole_windows(rows: int) -> int:
    """The rows of the windows that cover ``rows``."""
    return -(-rows // WINDOW) * WINDOW


def key_name(layer: int) -> str:
    return f"key_{layer}"


def value_name(layer: int) -> str:
    return f"value_{layer}"


@dataclass(frozen=True)
class Buffer:
    """A tensor of the cache, which is an input of the graph under this name."""

    name: str
    heads: int
    width: int
    dtype: torch.dtype

    def shape(self, batch: int, rows: int) -> tuple[int, int, int, int]:
        return (batch, self.heads, rows, self.width)


@dataclass(frozen=True)
class Rows:
    """The K or the V of one layer: the buffers that it lies in, and how."""

    name: str  # of the first buffer
    heads: int
    dim: int
    dtype: torch.dtype  # that the model computes with
    device: torch.device
    format: KVFormat | None  # None: as the model has it

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        parts = (Part("", self.dtype, self.dim),) if self.format is None else self.format.parts(self.dim)
        names = (f"{self.name}_{part.suffix}" if part.suffix else self.name for part in parts)
        return tuple(Buffer(name, self.heads, p.width, p.dtype) for name, p in zip(names, parts, strict=True))

    def encode(self, rows: Any, run: Run = NOW) -> tuple[Any, ...]:
        """What of ``rows`` [B, H, S, D] goes into each buffer."""
        if self.format is None:
            return (rows,)
        wide = rows if self.dtype is torch.float32 else run(torch.ops.aten.to.dtype, rows, torch.float32)
        return self.format.encode(run, wide, self.dim, self.device)

    def decode(self, parts: Sequence[Any], run: Run = NOW, *, turned_back: bool = True) -> Any:
        """The rows that such parts stand for; turned as they are kept, if nobody turns them back."""
        if self.format is None:
            return parts[0]
        wide = self.format.decode(run, parts, self.dim, self.device)
        if self.format.turns and turned_back:
            wide = turned(run, wide, self.dim, self.device)
        return wide if self.dtype is torch.float32 else run(torch.ops.aten.to.dtype, wide, self.dtype)

    def turned(self, rows: Any, run: Run = NOW) -> Any:
        """Rows [..., D] of the model's own dtype, turned as a format that turns keeps them."""
        cast = torch.ops.aten.to.dtype
        wide = rows if self.dtype is torch.float32 else run(cast, rows, torch.float32)
        made = turned(run, wide, self.dim, self.device)
        return made if self.dtype is torch.float32 else run(cast, made, self.dtype)


@dataclass(frozen=True)
class KVShape:
    """What one layer keeps per token: the heads and widths of its key and its value, and in which formats."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    key_format: FormatName | None = None  # of kv_formats; None: the dtype of the model
    value_format: FormatName | None = None

    def shapes(self, batch: int, rows: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        return (batch, self.key_heads, rows, self.key_dim), (batch, self.value_heads, rows, self.value_dim)


@dataclass(frozen=True)
class Facts:
    """What is true of the model and of this request, whatever the graph looks like.

    How rows of the cache and weights are kept is what a pass may change, with the buffers of its graph.
    """

    layers: tuple[KVShape, ...]
    capacity: int  # rows of every cache buffer
    max_len: int
    dtype: torch.dtype  # of keys and values, as the model computes with them
    device: torch.device
    gated_mlps: int  # MLPs with a gate and an up projection of their own
    split_qkv: int  # attention layers with three projections of their own
    grouped_layers: int  # layers that keep fewer heads than the query has
    output_class: type  # what the model's forward returns
    backend: str = "eager"  # what the graphs will be handed to
    compile: str = "whole"  # in which pieces: "whole", "layer", or "auto"
    weights: tuple[CodedWeight, ...] = ()  # that lie in the graph as codes
    attention: TimedForms | None = None  # of one query, where its forms were timed on the device
    linears: TimedForms | None = None  # of many rows, where libraries were timed on the device

    def rows(self, layer: int) -> tuple[Rows, Rows]:
        """How the K and the V of a layer are kept."""
        one = self.layers[layer]
        key = FORMATS[one.key_format][0] if one.key_format else None
        value = FORMATS[one.value_format][1] if one.value_format else None
        return (
            Rows(key_name(layer), one.key_heads, one.key_dim, self.dtype, self.device, key),
            Rows(value_name(layer), one.value_heads, one.value_dim, self.dtype, self.device, value),
        )

    def buffers(self) -> dict[Buffer, int]:
        """Every buffer of the cache with its layer."""
        layers = range(len(self.layers))
        return {buffer: layer for layer in layers for rows in self.rows(layer) for buffer in rows.buffers}

    @property
    def formats(self) -> tuple[FormatName, ...]:
        """The formats that any of the buffers is in, other than the model's own dtype."""
        named = (name for layer in self.layers for name in (layer.key_format, layer.value_format))
        return tuple(dict.fromkeys(name for name in named if name))

    @property
    def weight_formats(self) -> tuple[WeightFormatName, ...]:
        """The formats that any of the weights is in."""
        return tuple(dict.fromkeys(one.dtype for one in self.weights))

    @property
    def rounds(self) -> bool:
        """Whether the graph says what the stock model would say with rounded weights, or over a rounded cache."""
        return bool(self.formats or self.weights)

    @property
    def layered(self) -> bool:
        """Whether like layers are compiled once and called in turn."""
        return self.compile == "layer" or (self.compile == "auto" and len(self.layers) >= DEEP)

    @property
    def fuses_sums(self) -> bool:
        """Whether a product and its sum will be one loop, and never lie in memory."""
        return self.backend == "inductor" and self.device.type == "cpu"

    @property
    def why_no_fused_sums(self) -> str:
        if self.backend != "inductor":
            return f"only Inductor fuses a product into its sum; {self.backend} would write it out"
        return f"measured on CPU only; on {self.device.type} the library's kernel stays"


@dataclass
class Program:
    """One graph: ``gm`` holds it and its weights; placeholders are named as above."""

    gm: GraphModule
    facts: Facts
    fake_mode: Any  # torch's FakeTensorMode, which ships without types

    @property
    def graph(self) -> torch.fx.Graph:
        return self.gm.graph

    @property
    def shape_env(self) -> ShapeEnv:
        shape_env = self.fake_mode.shape_env
        assert isinstance(shape_env, ShapeEnv)
        return shape_env

    def placeholders(self) -> dict[str, Node]:
        return {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}

    def has_input(self, name: str) -> bool:
        return name in self.placeholders()

    def add_input(self, name: str, example: Any, after: Node) -> Node:
        """Add a graph input, placed behind another one so that buffers stay last."""
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name)
        node.meta["val"] = example
        return node

    def output(self) -> Node:
        return self.graph.output_node()

    def results(self) -> list[Node]:
        """What the graph returns: the logits first."""
        outputs = self.output().args[0]
        assert isinstance(outputs, (tuple, list))
        return [node for node in outputs if isinstance(node, Node)]

    def logits(self) -> Node:
        return self.results()[0]

    def first_use_point(self) -> Node:
        """The first node behind the placeholders: where values that depend on inputs alone go."""
        first: Node = next(node for node in self.graph.nodes if node.op != "placeholder")
        return first

    def value_of(self, node: Node) -> Any:
        """What a ``get_attr`` node reads: a weight, or the body of a higher-order op."""
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def attribute(self, node: Node) -> torch.Tensor:
        """The weight that a ``get_attr`` node reads."""
        value = self.value_of(node)
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{node} reads {node.target}, which is a {type(value).__name__} and no tensor")
        return value

    def weight(self, name: str) -> torch.Tensor:
        """The weight of this name."""
        return operator.attrgetter(name)(self.gm)  # type: ignore[no-any-return]

    def weights(self) -> Iterator[tuple[Node, torch.Tensor]]:
        """Every node that reads a weight, with the weight."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and isinstance(value := self.value_of(node), torch.Tensor):
                yield node, value

    def copy(self) -> Program:
        """A program with a graph of its own that shares every weight with this one."""
        graph = torch.fx.Graph(tracer_cls=self.graph._tracer_cls)
        mapping: dict[Node, Node] = {}
        result = graph.graph_copy(self.graph, mapping)
        graph.output(result)
        new_output = next(iter(reversed(graph.nodes)))
        new_output.meta = copy.copy(self.output().meta)
        return self._with(graph)

    def trimmed(self) -> Program:
        """The same graph, holding on to no other weights than those that it reads; this program is used up."""
        return self._with(self.graph)

    def _with(self, graph: torch.fx.Graph) -> Program:
        # Its Python code is written when it is first run: most graphs are only read and edited.
        return replace(self, gm=_LazyGraphModule(self.gm, graph, class_name="CausalLM"))
