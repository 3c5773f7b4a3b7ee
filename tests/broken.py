"""Passes that are wrong on purpose, each in a way that a rewrite may really be wrong in."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.attention import LayerAttention, RowWrite
from fxopt.merge import merge_linears
from fxopt.passes.fuse_gate_up import FuseGateUp, Gate
from fxopt.passes.fuse_qkv import FuseQKV, Projections
from fxopt.passes.rotary import Rotary, Rotation
from fxopt.passes.window_kv import WindowKV
from fxopt.program import ATTENTION_MASK, CACHE_POSITION, INPUT_IDS, POSITION_IDS, Program
from fxopt.rewrite import Pass, Stage
from fxopt.views import Linear, swap_argument

aten = torch.ops.aten


@dataclass(frozen=True)
class At:
    """Any node."""

    node: Node


def replaced(program: Program, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and new not in user.users)


@dataclass(frozen=True)
class SwappedProjections(FuseQKV):
    """The rows of K's weight where V's should be, and the other way round."""

    def rewrite(self, program: Program, site: Projections) -> None:
        super().rewrite(program, site)
        outputs = [n for n in program.graph.nodes if n.target is operator.getitem and n.args[1] in (1, 2)][-2:]
        outputs[0].args, outputs[1].args = outputs[1].args, outputs[0].args


@dataclass(frozen=True)
class WrongHeadOrder(Pass[LayerAttention]):
    """The heads of the query the other way round."""

    name = "wrong_head_order"
    summary = "broken"
    after = "fuse_qkv"

    def find(self, program: Program) -> Iterator[Any]:
        yield from LayerAttention.search(program)

    def rewrite(self, program: Program, site: LayerAttention) -> None:
        with program.graph.inserting_before(site.node):
            flipped = program.graph.call_function(aten.flip.default, (site.query, [1]))
        swap_argument(site.node, site.query, flipped)


@dataclass(frozen=True)
class SwappedGate(FuseGateUp):
    """act(up) * gate."""

    name = "fuse_gate_up"

    def rewrite(self, program: Program, site: Gate) -> None:
        gate, up = Linear.of(site.gate.node), Linear.of(site.up.node)
        assert gate is not None
        assert up is not None
        gate_weight, up_weight = gate.weight, up.weight
        merge_linears(
            program, (Linear(gate.node, gate.x, up_weight, gate.bias), Linear(up.node, up.x, gate_weight, up.bias))
        )


@dataclass(frozen=True)
class LatePositions(Pass[At]):
    """Every position one too high: what rotary attention computes is the same, what it caches is not."""

    name = "late_positions"
    summary = "broken"
    after = "window_kv"

    def find(self, program: Program) -> Iterator[At]:
        yield At(program.placeholders()[POSITION_IDS])

    def rewrite(self, program: Program, site: At) -> None:
        with program.graph.inserting_before(program.first_use_point()):
            late = program.graph.call_function(aten.add.Tensor, (site.node, 1))
        replaced(program, site.node, late)


@dataclass(frozen=True)
class ShortWindow(WindowKV):
    """The last row of a window is never attended to: wrong once in 64 steps."""

    def finish(self, program: Program, matched: int) -> None:
        super().finish(program, matched)
        mask = program.placeholders()[ATTENTION_MASK]
        readers = [user for user in mask.users if user.target is not aten.sym_size.int]
        with program.graph.inserting_before(min(readers)):
            first = program.graph.call_function(aten.slice.Tensor, (mask, 1, 0, -1))
            short = program.graph.call_function(aten.constant_pad_nd.default, (first, [0, 1]))
        for reader in readers:
            swap_argument(reader, mask, short)


@dataclass(frozen=True)
class KeysAsValues(Pass[At]):
    """K of this step is written into the buffer of V."""

    name = "keys_as_values"
    summary = "broken"
    after = "static_kv"

    def find(self, program: Program) -> Iterator[At]:
        inputs = program.placeholders()
        for layer in range(len(program.facts.layers)):
            yield At(inputs[f"value_{layer}"])

    def rewrite(self, program: Program, site: At) -> None:
        key = program.placeholders()[site.node.name.replace("value", "key")]
        keys, values = RowWrite.into(key), RowWrite.into(site.node)
        assert keys is not None
        assert values is not None
        swap_argument(values.node, values.new, keys.new)


@dataclass(frozen=True)
class SeesPadding(Pass[At]):
    """Every row that was ever written may be attended to, padding too."""

    name = "sees_padding"
    summary = "broken"
    after = "window_kv"

    def find(self, program: Program) -> Iterator[At]:
        yield At(program.placeholders()[ATTENTION_MASK])

    def rewrite(self, program: Program, site: At) -> None:
        readers = [user for user in site.node.users if user.target is not aten.sym_size.int]
        with program.graph.inserting_before(min(readers)):
            ones = program.graph.call_function(aten.ones_like.default, (site.node,))
        for reader in readers:
            swap_argument(reader, site.node, ones)


@dataclass(frozen=True)
class WrongRotation(Rotary):
    """x * cos - rotated * sin."""

    def rewrite(self, program: Program, site: Rotation) -> None:
        with program.graph.inserting_before(site.node):
            negative = program.graph.call_function(aten.neg.default, (site.sin,))
        super().rewrite(program, Rotation(site.node, site.x, negative, site.half))


@dataclass(frozen=True)
class ForgetsTheSlidingWindow(Pass[At]):
    """The model's sliding window never ends: right for as many tokens as it is long."""

    sliding: int = 100
    name = "forgets_the_sliding_window"
    summary = "broken"
    after = "window_kv"

    def find(self, program: Program) -> Iterator[At]:
        for node in program.graph.nodes:
            if self.sliding in (abs(a) for a in node.args if isinstance(a, int)):
                yield At(node)

    def rewrite(self, program: Program, site: At) -> None:
        far = [a * 1000 if isinstance(a, int) and abs(a) == self.sliding else a for a in site.node.args]
        site.node.args = tuple(far)


@dataclass(frozen=True)
class NarrowNorm(Pass[At]):
    """Norms keep eight bits of their scale, but only where the model is in bfloat16."""

    name = "narrow_norm"
    summary = "broken"
    after = "fuse_qkv"

    def find(self, program: Program) -> Iterator[At]:
        for node in program.graph.nodes:
            if node.target is aten.rsqrt.default and program.facts.dtype is torch.bfloat16:
                yield At(node)

    def rewrite(self, program: Program, site: At) -> None:
        with program.graph.inserting_after(site.node):
            rough = program.graph.call_function(aten.mul.Tensor, (site.node, 1.02))
        site.node.replace_all_uses_with(rough, delete_user_cb=lambda user: user is not rough)


@dataclass(frozen=True)
class WrongInDecode(Pass[At]):
    """A pass on the decode graph that scales the logits of one token."""

    name = "wrong_in_decode"
    summary = "broken"
    stage = Stage.DECODE

    def find(self, program: Program) -> Iterator[At]:
        yield At(program.logits())

    def rewrite(self, program: Program, site: At) -> None:
        with program.graph.inserting_after(site.node):
            louder = program.graph.call_function(aten.mul.Tensor, (site.node, 1.01))
        site.node.replace_all_uses_with(louder, delete_user_cb=lambda user: user is not louder)


@dataclass(frozen=True)
class WritesOneRowLate(Pass[At]):
    """K and V of this step go one row behind where they belong."""

    name = "writes_one_row_late"
    summary = "broken"
    after = "window_kv"

    def find(self, program: Program) -> Iterator[At]:
        for node in program.graph.nodes:
            if node.target is aten.index_copy_.default:
                yield At(node)

    def rewrite(self, program: Program, site: At) -> None:
        position = program.placeholders()[CACHE_POSITION]
        with program.graph.inserting_before(site.node):
            late = program.graph.call_function(aten.add.Tensor, (position, 1))
        swap_argument(site.node, position, late)


@dataclass(frozen=True)
class DoesNotRun(Pass[At]):
    """A graph that shapes say is right and that fails when run."""

    name = "does_not_run"
    summary = "broken"
    after = "rotary"

    def find(self, program: Program) -> Iterator[At]:
        yield At(program.placeholders()[INPUT_IDS])

    def rewrite(self, program: Program, site: At) -> None:
        readers = [user for user in site.node.users if user.target is aten.embedding.default]
        with program.graph.inserting_before(min(readers)):
            far = program.graph.call_function(aten.add.Tensor, (site.node, 10**6))
        swap_argument(readers[0], site.node, far)
