"""The passes for a graph of any program: no cache of ours in it, and nobody to verify the result.

A captured model has cache buffers to find attention by, hands out nothing but logits, and asserts
nothing that a user wrote. Of a graph that Dynamo made none of that is known. Here are the same
rewrites, which find attention by the call itself, and leave alone what only a captured model makes
safe: what the program hands out as it lies in memory, what it writes into, checks of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxopt.attention import MATMULS, PASSIVE, Attention, LayerAttention, RepeatedHeads, RowWrite
from fxopt.only import Only
from fxopt.passes.fuse_gate_up import FuseGateUp, Gate
from fxopt.passes.fuse_qkv import FuseQKV, Projections
from fxopt.passes.grouped_attention import GroupedAttention
from fxopt.passes.remove_control_flow import COPIES, Branch, Check, Identity, Place, RemoveControlFlow
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.seats import why_not_joined
from fxopt.views import Linear, Miss, is_tensor, memory_of, mutated_arguments, mutates, shape, upstream, written_memory

aten = torch.ops.aten
LINEARS = frozenset({aten.linear.default})
SIZES = frozenset({aten.sym_size.int})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})


@dataclass(frozen=True)
class UncachedControlFlow(RemoveControlFlow):
    required = False

    def find(self, program: Program) -> Iterator[Place]:
        for place in super().find(program):
            if not _is_meant(program, place):
                yield place

    def refuse(self, program: Program, site: Place) -> str | None:
        match site:
            case Identity(node) if node.target in COPIES and node in _handed_out(program):
                return f"{node} copies what is handed out, so that whoever gets it may write into it"
            case Branch(node, Node(), when_true, when_false, _) if not (
                _cannot_fail(when_true) and _cannot_fail(when_false)
            ):
                return f"{node} chooses by data, and a branch that is not chosen might fail or take long"
        return super().refuse(program, site)


def _is_meant(program: Program, place: Place) -> bool:
    """Whether somebody may rely on what a captured model would do without."""
    match place:
        case Check(node):  # assertions that no tracing leaves behind are the program's own
            return node.target is not aten._assert_tensor_metadata.default
        case Identity(node):  # what is handed out is a tensor of its own; compilers take constants by this copy
            return program.output() in node.users or node.target is aten.lift_fresh_copy.default
    return False


@dataclass(frozen=True)
class UncachedFuseQKV(FuseQKV):
    def find(self, program: Program) -> Iterator[Projections | Miss]:
        taken: set[Node] = set()
        for layer in attentions(program):
            sources = tuple(_sources(end, LINEARS) for end in (layer.query, layer.key, layer.value))
            linears = sources[0].union(*sources)
            if not linears:
                yield Miss(layer.node, f"no linear is in front of it; the query comes from {layer.query}")
            elif not taken.isdisjoint(linears):
                yield Miss(layer.node, "other attention reads the same projections")
            elif len(set(sources)) > 1:  # one linear for all three: nothing left to do
                taken |= linears
                yield Projections(layer.node, sources)

    def refuse(self, program: Program, site: Projections) -> str | None:
        return super().refuse(program, site) or _why_apart(program, site.parts)


@dataclass(frozen=True)
class UncachedFuseGateUp(FuseGateUp):
    def refuse(self, program: Program, site: Gate) -> str | None:
        return super().refuse(program, site) or _why_apart(program, (site.gate, site.up))


@dataclass(frozen=True)
class UncachedGroupedAttention(GroupedAttention):
    def find(self, program: Program) -> Iterator[LayerAttention | Miss]:
        for layer in attentions(program):
            if layer.key is not layer.key_write.node and layer.value is not layer.value_write.node:
                yield layer

    def refuse(self, program: Program, site: LayerAttention) -> str | None:
        if (reason := super().refuse(program, site)) is not None:
            return reason
        for kept, reader in ((site.key_write.node, site.scores), (site.value_write.node, site.weighted)):
            if _is_written(program, kept, kept, reader):
                return f"{site.node}: {kept} is written into after its heads were repeated"
        return None


#: The built-in passes that need no cache, and how each is applied without one.
UNCACHED: dict[type[Pass[Any]], type[Pass[Any]]] = {
    RemoveControlFlow: UncachedControlFlow,
    GroupedAttention: UncachedGroupedAttention,
    FuseQKV: UncachedFuseQKV,
    FuseGateUp: UncachedFuseGateUp,
}


def uncached(rewriter: Pass[Any]) -> Pass[Any] | None:
    """A built-in pass with the same options for a graph without a cache; None if it needs one."""
    if isinstance(rewriter, Only):
        inner = uncached(rewriter.inner)
        return None if inner is None else replace(rewriter, inner=inner)
    kind = UNCACHED.get(type(rewriter))
    if kind is None:
        return None
    return kind(**{field.name: getattr(rewriter, field.name) for field in fields(rewriter)})  # type: ignore[arg-type]


def attentions(program: Program) -> Iterator[LayerAttention]:
    """Attention as one call, or as two products around a softmax; what is kept are heads not yet repeated."""
    for node in program.graph.nodes:
        attention = Attention.of(node)
        if attention is not None:
            yield _site(node, node, attention.query, attention.key, attention.value)
        elif node.target in SOFTMAXES:
            yield from _by_products(node)


def _by_products(softmax: Node) -> Iterator[LayerAttention]:
    """``weighted = matmul(softmax(... matmul(query, key) ...), value)``"""
    sources = _sources(softmax, LINEARS.union(MATMULS))
    weighted, probabilities = _reader(softmax)
    if len(sources) != 1 or weighted is None:
        return
    (scores,) = sources
    if scores.target not in MATMULS or weighted.target not in MATMULS:
        return
    first, second = MATMULS[scores.target], MATMULS[weighted.target]
    if weighted.args[second] is probabilities:
        query, key, value = scores.args[first], scores.args[first + 1], weighted.args[second + 1]
        assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
        yield _site(scores, weighted, query, key, value)


def _sources(node: Node, calls: frozenset[Any]) -> frozenset[Node]:
    """The nearest of some calls whose values ``node`` is computed from; sizes do not count."""
    return frozenset(found for found in upstream(node, calls | SIZES) if found.target in calls)


def _reader(node: Node) -> tuple[Node | None, Node]:
    """The only call that computes with ``node``, past those that rearrange it, and the operand it reads."""
    while True:
        readers = [user for user in node.users if user.target not in SIZES]
        if len(readers) != 1 or readers[0].op == "output":
            return None, node
        if readers[0].target not in PASSIVE and readers[0].target is not aten.flatten.using_ints:
            return readers[0], node
        node = readers[0]


def _site(scores: Node, weighted: Node, query: Node, key: Node, value: Node) -> LayerAttention:
    keys, values = _kept(key), _kept(value)  # there is no buffer: what comes in is all that is read
    writes = RowWrite(keys, keys, keys), RowWrite(values, values, values)
    return LayerAttention(-1, *writes, scores, weighted, query, key, value)


def _kept(operand: Node) -> Node:
    """The heads of K or V before each is written out for a group; the operand itself when none is."""
    repeated = operand
    if operand.target is aten.transpose.int and isinstance(operand.args[0], Node):
        repeated = operand.args[0]
    found = RepeatedHeads.of(repeated) if is_tensor(repeated) else None
    return operand if found is None else found.source


def _why_apart(program: Program, parts: Sequence[Linear]) -> str | None:
    """What in the program around them keeps linears over one input from being one."""
    names = ", ".join(str(part.node) for part in parts)
    weights = [part.weight for part in parts]
    biases = [part.bias for part in parts if part.bias is not None]
    for group in (weights, biases):
        reason = why_not_joined([program.attribute(node) for node in group]) if group else None
        if reason is not None:
            return f"{names}: the weights cannot be packed, since {reason}"
    if any(len(shape(weight)) != 2 for weight in weights):
        return f"{names}: a weight is no matrix"
    if handed := _handed_out(program).intersection(part.node for part in parts):
        return f"{names}: {min(handed)} is handed out, and would be a part of a larger tensor"
    if not written_memory(program).isdisjoint(weights + biases):
        return f"{names}: a weight is written into by the graph itself"
    order = sorted(part.node for part in parts)
    if _is_written(program, parts[0].x, order[0], order[-1]):
        return f"{names}: {parts[0].x} is written into between them"
    return None


def _handed_out(program: Program) -> set[Node]:
    """The nodes whose memory the results of the program lie in."""
    return {memory_of(node) for node in program.output().all_input_nodes}


def _is_written(program: Program, tensor: Node, first: Node, last: Node) -> bool:
    """Whether the memory of ``tensor`` is written into between two nodes."""
    memory = memory_of(tensor)
    return any(
        memory_of(written) is memory
        for node in program.graph.nodes
        if mutates(node) and first < node < last
        for written in mutated_arguments(node)
    )


def _cannot_fail(body: GraphModule) -> bool:
    """Whether a branch is arithmetic on floats alone, which does no harm where it was not asked for."""
    calls = [node for node in body.graph.nodes if node.op == "call_function"]
    return all(
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
        and is_tensor(node)
        and node.meta["val"].is_floating_point()
        for node in calls
    )
