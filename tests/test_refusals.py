"""Places that a pass must leave alone: the sentence, the node, the unchanged program, the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

import fxopt
from fxopt import cache as caches
from fxopt.admission import select
from fxopt.capture import capture
from fxopt.driver import apply, require
from fxopt.errors import RewriteError
from fxopt.families import VOCABULARY, tiny
from fxopt.listing import readable
from fxopt.outcome import Outcome
from fxopt.passes import PASSES
from fxopt.passes.decode_attention import DecodeAttention
from fxopt.passes.fuse_gate_up import FuseGateUp
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.grouped_attention import GroupedAttention
from fxopt.passes.last_logits import LastLogits
from fxopt.passes.matvec import Matvec
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.passes.rotary import Rotary
from fxopt.passes.static_kv import StaticKV
from fxopt.passes.window_kv import WindowKV
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    Facts,
    KVShape,
    Program,
    key_name,
    value_name,
)
from fxopt.propagate import mark_edited, propagate, snapshot
from fxopt.rewrite import Pass, Stage
from fxopt.specialise import Role, specialise

aten = torch.ops.aten
CAPACITY = 64
PAST, STEP, BATCH = 5, 3, 2
END = 2**63 - 1

Edit = Callable[[Program], None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for a second thread takes longer than the work of a tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def captured(family: str = "llama", **changes: Any) -> Program:
    """One layer of a family, asserts and identities gone."""
    program = capture(tiny(family, num_hidden_layers=1, **changes), max_len=32, capacity=CAPACITY)
    return apply(RemoveControlFlow(), program)[0]


@cache
def static(family: str = "llama", **changes: Any) -> Program:
    return apply(StaticKV(), captured(family, **changes))[0]


@cache
def decode(batch: int = 1, backend: str = "inductor") -> Program:
    """The graph of one new token, as the decode passes get it."""
    program = captured()
    for kind in PASSES[1:]:
        if kind.stage is Stage.SYMBOLIC:
            program, _ = apply(kind(), program)
    program = specialise(program, Role("decode", batch, longest_step=1))
    return dataclasses.replace(program, facts=dataclasses.replace(program.facts, backend=backend))


@contextlib.contextmanager
def edited(program: Program) -> Iterator[Program]:
    """A copy to edit; shapes are right again and the code is made anew when the block ends."""
    draft = program.copy()
    known = snapshot(draft)
    yield draft
    propagate(draft, known)
    draft.graph.lint()
    draft.gm.recompile()


def call(program: Program, target: Any, index: int = 0) -> Node:
    """One of the calls of an operator, counted in graph order."""
    found: list[Node] = [node for node in program.graph.nodes if node.target is target]
    return found[index]


def replaced(node: Node, position: int, value: Any) -> None:
    """Give a node another operand."""
    node.args = (*node.args[:position], value, *node.args[position + 1 :])
    mark_edited(node)


def before(program: Program, node: Node, target: Any, *args: Any) -> Node:
    with program.graph.inserting_before(node):
        return program.graph.call_function(target, args)


def parts_of(cat: Node) -> list[Node]:
    """The operands of a cat."""
    parts = cat.args[0]
    assert isinstance(parts, (list, tuple))
    return [part for part in parts if isinstance(part, Node)]


def source_of(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def into_logits(program: Program, value: Node) -> None:
    """Add the sum of a tensor to the logits, so that it counts."""
    logits, output = program.logits(), program.output()
    with program.graph.inserting_before(output):
        total = program.graph.call_function(aten.sum.default, (value,))
        shifted = program.graph.call_function(aten.add.Tensor, (logits, total))
    logits.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is output)


def run(program: Program) -> Tensor:
    """The logits of one step behind a few past tokens, for a graph of any stage."""
    inputs = program.placeholders()
    sizes = inputs[INPUT_IDS].meta["val"].shape
    batch, step = (size if isinstance(size, int) else many for size, many in zip(sizes, (BATCH, STEP), strict=True))
    is_static = CACHE_POSITION in inputs
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(PAST, PAST + step)
    mask = torch.ones(batch, PAST + step, dtype=torch.long)
    tensors = {
        INPUT_IDS: torch.randint(0, VOCABULARY, (batch, step), generator=generator),
        ATTENTION_MASK: nn.functional.pad(mask, (0, CAPACITY - PAST - step)) if is_static else mask,
        POSITION_IDS: positions.expand(batch, step),
        CACHE_POSITION: positions,
        LOGIT_POSITIONS: torch.arange(step - 1, step),
    }
    for layer, kept in enumerate(program.facts.layers):
        for name, shape in zip((key_name(layer), value_name(layer)), kept.shapes(batch, PAST), strict=True):
            rows = torch.randn(shape, generator=generator)
            tensors[name] = nn.functional.pad(rows, (0, 0, 0, CAPACITY - PAST)) if is_static else rows
    with torch.no_grad():
        logits = program.gm(*(tensors[name] for name in inputs))[0]
    assert isinstance(logits, Tensor)
    return logits


def attempt(rewriter: Pass[Any], program: Program) -> tuple[Program, Outcome]:
    """Apply, and see that the program given is still the same text."""
    text = readable(program)
    result, outcome = apply(rewriter, program)
    assert readable(program) == text
    return result, outcome


def assert_refused(program: Program, outcome: Outcome, *words: str) -> None:
    """One refusal, in a sentence with these words, at a node that the program has."""
    assert len(outcome.refused) == 1, outcome
    refusal = outcome.refused[0]
    assert refusal.node in {node.name for node in program.graph.nodes}
    for word in words:
        assert word in refusal.reason, refusal
    assert refusal.reason[0] != " "
    assert "\n" not in refusal.reason


def assert_same_numbers(program: Program, result: Program) -> None:
    torch.testing.assert_close(run(result), run(program), atol=1e-5, rtol=1e-5)


# --- fuse_qkv and fuse_gate_up -------------------------------------------------------------------


def k_reads_something_else(program: Program) -> None:
    k = call(program, aten.linear.default, 1)
    replaced(k, 0, before(program, k, aten.mul.Tensor, k.args[0], 1.5))


def k_weight_is_computed(program: Program) -> None:
    k = call(program, aten.linear.default, 1)
    replaced(k, 1, before(program, k, aten.mul.Tensor, k.args[1], 1.5))


def gate_weight_is_computed(program: Program) -> None:
    gate = call(program, aten.linear.default, 4)
    replaced(gate, 1, before(program, gate, aten.mul.Tensor, gate.args[1], 1.5))


@pytest.mark.parametrize(
    ("rewriter", "edit", "words"),
    [
        (FuseQKV(), k_reads_something_else, ["linear, linear_1, linear_2", "same input"]),
        (FuseQKV(), k_weight_is_computed, ["linear, linear_1, linear_2", "computed in the graph"]),
        (FuseGateUp(), gate_weight_is_computed, ["linear_4, linear_5", "computed in the graph"]),
    ],
)
def test_linears_that_cannot_be_one(rewriter: Pass[Any], edit: Edit, words: list[str]) -> None:
    with edited(static()) as program:
        edit(program)
    result, outcome = attempt(rewriter, program)
    assert (outcome.matched, outcome.expected) == (0, 1)
    assert_refused(program, outcome, *words)
    assert readable(result) == readable(program)
    assert_same_numbers(program, result)


def test_key_from_two_linears_is_not_fused() -> None:
    """The key is the sum of two projections: no three linears to pack."""
    with edited(static()) as program:
        write = call(program, aten.index_copy_.default, 0)
        values = call(program, aten.index_copy_.default, 1).args[3]
        assert isinstance(values, Node)
        replaced(write, 3, before(program, write, aten.add.Tensor, write.args[3], values))
    result, outcome = attempt(FuseQKV(), program)
    assert outcome.matched == 0
    assert_refused(program, outcome, "scaled_dot_product_attention", "not from one linear of its own")
    assert_same_numbers(program, result)


@pytest.mark.parametrize(
    ("rewriter", "family", "changes", "module", "words"),
    [
        (FuseQKV(), "qwen2", {}, "self_attn.k_proj", ["linear, linear_1, linear_2", "only linear, linear_2", "bias"]),
        (FuseGateUp(), "llama", {"mlp_bias": True}, "mlp.up_proj", ["linear_4, linear_5", "only linear_4", "bias"]),
    ],
)
def test_a_bias_that_one_part_lacks(
    rewriter: Pass[Any], family: str, changes: dict[str, Any], module: str, words: list[str]
) -> None:
    stock = tiny(family, num_hidden_layers=1, **changes)
    stock.model.layers[0].get_submodule(module).bias = None
    program, _ = apply(RemoveControlFlow(), capture(stock, max_len=32, capacity=CAPACITY))
    program, _ = apply(StaticKV(), program)
    result, outcome = attempt(rewriter, program)
    assert (outcome.matched, outcome.expected) == (0, 1)
    assert_refused(program, outcome, *words)
    assert_same_numbers(program, result)


def test_refused_in_one_layer_matched_in_the_other() -> None:
    """The sentence reaches the report, the tokens are the stock model's, and strict=True asks for all."""
    stock = tiny("qwen2")
    stock.model.layers[1].self_attn.k_proj.bias = None
    fast: Any = fxopt.optimize(stock, 32, backend="eager")
    outcome = next(o for o in fast.fxopt.report.passes if o.name == "fuse_qkv")
    assert (outcome.matched, outcome.expected) == (1, 2)
    assert "has a bias" in str(fast.fxopt.report)
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()
    with pytest.raises(RewriteError, match=r"fuse_qkv matched 1 of 2 places .*bias.*strict"):
        fxopt.optimize(stock, 32, backend="eager", strict=True)


@pytest.mark.parametrize(
    ("rewriter", "index", "names"),
    [(FuseQKV(), 1, "linear, linear_1, linear_2"), (FuseGateUp(), 5, "linear_4, linear_5")],
)
def test_weights_of_two_dtypes(rewriter: Pass[Any], index: int, names: str) -> None:
    """No such graph runs, so only the verdict is looked at."""
    program = static().copy()
    weight = call(program, aten.linear.default, index).args[1]
    assert isinstance(weight, Node)
    path, _, name = str(weight.target).rpartition(".")
    value = program.attribute(weight).detach().to(torch.float64)
    setattr(program.gm.get_submodule(path), name, nn.Parameter(value, requires_grad=False))
    result, outcome = attempt(rewriter, program)
    assert outcome.matched == 0
    assert_refused(program, outcome, names, "dtype")
    assert readable(result) == readable(program)


def test_up_that_reads_something_else_is_no_gated_mlp() -> None:
    with edited(static()) as program:
        up = call(program, aten.linear.default, 5)
        replaced(up, 0, before(program, up, aten.mul.Tensor, up.args[0], 1.5))
    result, outcome = attempt(FuseGateUp(), program)
    assert (outcome.matched, outcome.refused) == (0, [])
    assert_same_numbers(program, result)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_projections_that_are_one_already(family: str) -> None:
    program = static(family)
    result, outcome = attempt(FuseQKV(), program)
    assert (outcome.matched, outcome.expected, outcome.refused) == (0, 0, [])
    assert readable(result) == readable(program)


# --- static_kv -----------------------------------------------------------------------------------


def past_is_read_twice(program: Program) -> None:
    for name in (key_name(0), value_name(0)):
        into_logits(program, program.placeholders()[name])


def new_rows_come_first(program: Program) -> None:
    for index in (3, 4):
        cat = call(program, aten.cat.default, index)
        replaced(cat, 0, parts_of(cat)[::-1])


def three_parts(program: Program) -> None:
    """Between the past and the new rows stand none of a third tensor."""
    for index in (3, 4):
        cat = call(program, aten.cat.default, index)
        past, new = parts_of(cat)
        replaced(cat, 0, [past, before(program, cat, aten.slice.Tensor, new, 2, 0, 0), new])


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (past_is_read_twice, ["key_0 is read by", "cat_3", "sum_default", "not by one cat"]),
        (new_rows_come_first, ["cat_3", "does not append new rows behind the past"]),
        (three_parts, ["cat_3", "does not append new rows behind the past"]),
    ],
)
def test_a_past_that_does_not_simply_grow(edit: Edit, words: list[str]) -> None:
    """K and V are both refused, each by name, and the pass cannot be done without."""
    with edited(captured()) as program:
        edit(program)
    result, outcome = attempt(StaticKV(), program)
    assert (outcome.matched, outcome.expected, len(outcome.refused)) == (0, 2, 2)
    assert all(word in outcome.refused[0].reason for word in words), outcome
    assert any(name in outcome.refused[1].reason for name in ("value_0", "cat_4")), outcome
    assert_same_numbers(program, result)
    with pytest.raises(RewriteError) as raised:
        require(StaticKV(), outcome)
    for words_of_it in ("static_kv matched 0 of 2 places and is needed in full", *words, "modeling_llama.py:"):
        assert words_of_it in str(raised.value)


def total_rows(program: Program) -> Node:
    """``arange(past + step)``"""
    found: list[Node] = [node for node in program.graph.nodes if node.target is aten.arange.default]
    return found[-1]


def past_size(program: Program) -> Node:
    """The number of past tokens, read from the key."""
    found = [user for user in program.placeholders()[key_name(0)].users if user.target is aten.sym_size.int]
    return next(user for user in found if user.args[1] == 2)


def behind_the_rows(program: Program, target: Any, *args: Any) -> Node:
    rows = total_rows(program)
    with program.graph.inserting_after(rows):
        return program.graph.call_function(target, (rows, *args))


def slice_from_the_second_row(program: Program) -> None:
    into_logits(program, behind_the_rows(program, aten.slice.Tensor, 0, 1, END))


def slice_without_the_last_row(program: Program) -> None:
    into_logits(program, behind_the_rows(program, aten.slice.Tensor, 0, 0, -1))


def select_the_last_row(program: Program) -> None:
    into_logits(program, behind_the_rows(program, aten.select.int, 0, -1))


def past_as_a_number(program: Program) -> None:
    rows = total_rows(program)
    into_logits(program, before(program, rows, aten.scalar_tensor.default, past_size(program)))


def past_as_a_size(program: Program) -> None:
    rows = total_rows(program)
    into_logits(program, before(program, rows, aten.arange.default, past_size(program)))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (slice_from_the_second_row, ["slice_tensor takes rows 1 to", "no fixed place"]),
        (slice_without_the_last_row, ["slice_tensor takes rows 0 to", "no fixed place"]),
        (select_the_last_row, ["select_int picks row", "no fixed place"]),
        (past_as_a_number, ["scalar_tensor_default computes with the number of past tokens", "takes no tensor"]),
        (past_as_a_size, ["arange_default uses the number of past tokens alone as a size"]),
    ],
)
def test_a_use_of_the_past_without_a_static_form(edit: Edit, words: list[str]) -> None:
    """Found half way: the whole draft is given up and the very program that was given comes back."""
    with edited(captured()) as program:
        edit(program)
    result, outcome = attempt(StaticKV(), program)
    assert result is program
    assert outcome.matched == 0
    assert outcome.nodes_after == outcome.nodes_before
    assert_refused(program, outcome, *words)
    assert CACHE_POSITION not in result.placeholders()
    with pytest.raises(RewriteError, match="static_kv matched 0 of 2"):
        require(StaticKV(), outcome)


# --- window_kv -----------------------------------------------------------------------------------


def test_no_window_before_the_cache_is_static() -> None:
    program = captured()
    result, outcome = attempt(WindowKV(), program)
    assert (outcome.matched, outcome.expected, outcome.refused) == (0, 2, [])
    assert readable(result) == readable(program)
    assert_same_numbers(program, result)


def test_no_window_over_rows_written_elsewhere() -> None:
    """Both writes go to rows that are computed: nothing says that the window covers them."""
    with edited(static()) as program:
        for index in (0, 1):
            write = call(program, aten.index_copy_.default, index)
            replaced(write, 2, before(program, write, aten.add.Tensor, write.args[2], 0))
    result, outcome = attempt(WindowKV(), program)
    assert (outcome.matched, outcome.expected, outcome.refused) == (0, 2, [])
    assert_same_numbers(program, result)


# --- grouped_attention ---------------------------------------------------------------------------


def value_heads_are_joined(program: Program) -> None:
    """V's heads repeated by a cat."""
    attention = call(program, aten.scaled_dot_product_attention.default)
    value = call(program, aten.index_copy_.default, 1)
    replaced(attention, 2, before(program, attention, aten.cat.default, [value, value], 1))


def value_is_one_head_four_times(program: Program) -> None:
    """The first head of V repeated for every head of the query, while K repeats two."""
    attention = call(program, aten.scaled_dot_product_attention.default)
    head = before(program, attention, aten.slice.Tensor, call(program, aten.index_copy_.default, 1), 1, 0, 1)
    replaced(attention, 2, before(program, attention, aten.repeat_interleave.self_int, head, 4, 1))


def value_heads_are_tiled(program: Program) -> None:
    """Heads in the order 0 1 0 1 and not 0 0 1 1: another expansion, which grouping would not give."""
    attention = call(program, aten.scaled_dot_product_attention.default)
    value = call(program, aten.index_copy_.default, 1)
    wide = before(program, attention, aten.unsqueeze.default, value, 1)
    wide = before(program, attention, aten.expand.default, wide, [-1, 2, -1, -1, -1])
    flat = before(program, attention, aten.flatten.using_ints, wide, 1, 2)
    replaced(attention, 2, flat)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (value_heads_are_joined, ["scaled_dot_product_attention", "stands between the cache and the attention"]),
        (value_heads_are_tiled, ["scaled_dot_product_attention", "stands between the cache and the attention"]),
        (value_is_one_head_four_times, ["scaled_dot_product_attention", "K repeats its heads 2 times and V 4 times"]),
    ],
)
def test_heads_that_are_not_repeated_in_groups(edit: Edit, words: list[str]) -> None:
    with edited(static()) as program:
        edit(program)
    result, outcome = attempt(GroupedAttention(), program)
    assert (outcome.matched, outcome.expected) == (0, 1)
    assert_refused(program, outcome, *words)
    assert_same_numbers(program, result)


def test_an_old_gpu_keeps_its_expanded_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    program = static()
    program = dataclasses.replace(program, facts=dataclasses.replace(program.facts, device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    _, outcome = attempt(GroupedAttention(), program)
    assert outcome.matched == 0
    assert_refused(program, outcome, "cuda:0", "older than sm80")


def test_ungrouped_heads() -> None:
    program = static("llama", num_key_value_heads=4)
    result, outcome = attempt(GroupedAttention(), program)
    assert (outcome.matched, outcome.expected, outcome.refused) == (0, 0, [])
    assert readable(result) == readable(program)


def test_a_key_that_is_scaled_on_the_way() -> None:
    """Something else computes with the key between cache and product: it must not be lost."""
    with edited(static()) as program:
        attention = call(program, aten.scaled_dot_product_attention.default)
        replaced(attention, 1, before(program, attention, aten.mul.Tensor, attention.args[1], 2.0))
    result, outcome = attempt(GroupedAttention(), program)
    assert outcome.matched == 0
    assert_same_numbers(program, result)


# --- rotary --------------------------------------------------------------------------------------


def halves_in_order(program: Program) -> None:
    for index in (1, 2):
        cat = call(program, aten.cat.default, index)
        replaced(cat, 0, parts_of(cat)[::-1])


def nothing_negated(program: Program) -> None:
    for index in (1, 2):
        cat = call(program, aten.cat.default, index)
        negated, first = parts_of(cat)
        replaced(cat, 0, [source_of(negated), first])


def halves_of_two_tensors(program: Program) -> None:
    for index in (1, 2):
        cat = call(program, aten.cat.default, index)
        first = parts_of(cat)[1]
        source = before(program, first, aten.mul.Tensor, first.args[0], 1.5)
        replaced(first, 0, source)


def unequal_parts(program: Program) -> None:
    """Split behind three quarters instead of in the middle."""
    for index in (1, 2):
        cat = call(program, aten.cat.default, index)
        negated, first = parts_of(cat)
        replaced(first, 3, 12)
        replaced(source_of(negated), 2, 12)


@pytest.mark.parametrize("edit", [halves_in_order, nothing_negated, halves_of_two_tensors, unequal_parts])
def test_what_only_looks_like_a_rotation(edit: Edit) -> None:
    with edited(captured()) as program:
        edit(program)
    result, outcome = attempt(Rotary(), program)
    assert (outcome.matched, outcome.refused) == (0, [])
    assert_same_numbers(program, result)


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_models_without_a_rotated_half(family: str) -> None:
    """Learned positions; pairs instead of halves."""
    program = capture(tiny(family, n_layer=1), max_len=32, capacity=CAPACITY)
    _, outcome = attempt(Rotary(), program)
    assert (outcome.matched, outcome.refused) == (0, [])


# --- last_logits ---------------------------------------------------------------------------------


class Product(nn.Module):
    """A head that is a product with a transposed matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.t())


class Softmaxed(Product):
    """A head with something behind it that mixes the logits of one position."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).log_softmax(-1)


@pytest.mark.parametrize(("head", "op"), [(Product, "aten.matmul.default"), (Softmaxed, "aten.log_softmax.int")])
def test_a_head_that_is_not_linear(head: type[Product], op: str) -> None:
    stock = tiny("llama", num_hidden_layers=1)
    stock.lm_head = head(stock.lm_head)
    program = capture(stock, max_len=32, capacity=CAPACITY)
    result, outcome = attempt(LastLogits(), program)
    assert (outcome.matched, outcome.expected) == (0, 1)
    assert_refused(program, outcome, f"the logits are computed by {op}", "not by a linear layer")
    assert LOGIT_POSITIONS not in result.placeholders()
    assert_same_numbers(program, result)


def test_generation_with_a_head_that_is_not_linear() -> None:
    """The optimised model computes all logits and picks one row: the same tokens."""
    stock = tiny("llama", num_hidden_layers=1)
    stock.lm_head = Product(stock.lm_head)
    fast: Any = fxopt.optimize(stock, 32, backend="eager")
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()


def test_a_head_over_flattened_rows() -> None:
    with edited(static()) as program:
        head = program.logits()
        replaced(head, 0, before(program, head, aten.flatten.using_ints, head.args[0], 0, 1))
    result, outcome = attempt(LastLogits(), program)
    assert outcome.matched == 0
    assert_refused(program, outcome, "linear_7", "2 dimensions", "[batch, step, hidden]")
    assert_same_numbers(program, result)


# --- decode_attention and matvec -----------------------------------------------------------------


@pytest.mark.parametrize("rewriter", [DecodeAttention(), Matvec()])
@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("eager", "cpu", ["only Inductor", "eager would write it out"]),
        ("aot_eager", "cpu", ["only Inductor", "aot_eager would write it out"]),
        ("inductor", "cuda", ["CPU only", "cuda"]),
    ],
)
def test_decode_passes_stay_away_from_other_backends(
    rewriter: Pass[Any], backend: str, device: str, words: list[str]
) -> None:
    program = decode()
    facts = dataclasses.replace(program.facts, backend=backend, device=torch.device(device))
    program = dataclasses.replace(program, facts=facts)
    result, outcome = attempt(rewriter, program)
    assert (outcome.matched, outcome.expected) == (0, 0)
    assert outcome.refused
    for refusal in outcome.refused:
        assert all(word in refusal.reason for word in words), refusal
        assert refusal.node in {node.name for node in program.graph.nodes}
    assert readable(result) == readable(program)
    assert_same_numbers(program, result)


def test_a_causal_mask_made_in_the_kernel() -> None:
    with edited(decode()) as program:
        attention = call(program, aten.scaled_dot_product_attention.default)
        attention.args = attention.args[:3]
        attention.kwargs = {**attention.kwargs, "is_causal": True}
    result, outcome = attempt(DecodeAttention(), program)
    assert (outcome.matched, outcome.expected) == (0, 1)
    assert_refused(program, outcome, "scaled_dot_product_attention", "causal mask inside the kernel")
    assert_same_numbers(program, result)


def test_matmuls_of_two_rows_stay_matmuls() -> None:
    program = decode(batch=2)
    result, outcome = attempt(Matvec(), program)
    assert (outcome.matched, outcome.expected, outcome.refused) == (0, 0, [])
    assert readable(result) == readable(program)
    assert_same_numbers(program, result)


def test_attention_of_many_queries_stays_a_kernel() -> None:
    symbolic = apply(WindowKV(), static())[0]
    program = specialise(symbolic, Role("prefill", 1, longest_step=16))
    program = dataclasses.replace(program, facts=dataclasses.replace(program.facts, backend="inductor"))
    result, outcome = attempt(DecodeAttention(), program)
    assert (outcome.matched, outcome.expected, outcome.refused) == (0, 0, [])
    assert readable(result) == readable(program)


# --- remove_control_flow -------------------------------------------------------------------------


def traced(function: Callable[[Tensor], Tensor], example: Tensor) -> Program:
    """A function of one tensor as a program, made by hand."""

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return traced_module(Wrapped(), example)


def traced_module(wrapped: nn.Module, example: Tensor) -> Program:
    module = torch.export.export(wrapped, (example,), strict=False).module()
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
    graph.set_codegen(CodeGen())
    facts = Facts((), CAPACITY, 32, torch.float32, torch.device("cpu"), 0, 0, 0, tuple)
    fake_mode = next(node for node in graph.nodes if node.op == "placeholder").meta["val"].fake_mode
    return Program(GraphModule(module, graph), facts, fake_mode)


def copied_then_source_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    y.add_(1)
    return kept + y


def copied_then_copy_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    kept.mul_(3)
    return kept + y


@pytest.mark.parametrize("function", [copied_then_source_written, copied_then_copy_written])
def test_a_copy_that_a_later_write_needs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    program = traced(function, x)
    result, outcome = apply(RemoveControlFlow(), program)
    assert_refused(program, outcome, "clone copies a tensor that is written in place", "needed")
    assert [node.target for node in result.graph.nodes].count(aten.clone.default) == 1
    assert torch.equal(result.gm(x.clone())[0], function(x.clone()))
    assert torch.equal(program.gm(x.clone())[0], function(x.clone()))


def test_a_copy_that_nothing_needs_goes() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    program = traced(lambda x: (x * 1).clone() + 1, x)
    result, outcome = apply(RemoveControlFlow(), program)
    assert (outcome.matched, outcome.refused) == (1, [])
    assert aten.clone.default not in [node.target for node in result.graph.nodes]
    assert torch.equal(result.gm(x)[0], x + 1)


def test_a_write_is_no_dead_code() -> None:
    """Nobody reads the result of the write, but its target is read later."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y

    x = torch.arange(6.0)
    result, _ = apply(RemoveControlFlow(), traced(function, x))
    assert torch.equal(result.gm(x)[0], x * 2 + 1)


def copied_then_written_by_view(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    y.view(-1).add_(1)
    return kept + y


def copied_then_row_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    kept[0].add_(1)
    return kept + y


def copied_then_detached_and_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    kept.detach().add_(1)
    return kept + y


def copied_by_to(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.to(torch.float32, copy=True)
    kept.add_(1)
    return kept + y


@pytest.mark.parametrize(
    "function",
    [copied_then_written_by_view, copied_then_row_written, copied_then_detached_and_written, copied_by_to],
)
def test_a_copy_that_a_write_through_a_view_needs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    result, _ = apply(RemoveControlFlow(), traced(function, x))
    assert torch.equal(result.gm(x.clone())[0], function(x.clone()))


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def doubled(x: Tensor) -> Tensor:
    return x * 2


def plus_one_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(1)
    return y


def pure(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, plus_one, doubled, (x,))  # type: ignore[no-any-return]


def mutating(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, plus_one_in_place, doubled, (x,))  # type: ignore[no-any-return]


def nested(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, pure, doubled, (x,))  # type: ignore[no-any-return]


def nested_mutating(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, mutating, doubled, (x,))  # type: ignore[no-any-return]


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes]


BOTH_WAYS = [torch.arange(6.0).reshape(2, 3), -torch.ones(2, 3)]


def test_pure_branches_become_where() -> None:
    result, outcome = attempt(RemoveControlFlow(), program := traced(pure, BOTH_WAYS[0]))
    assert (outcome.matched, outcome.refused) == (1, [])
    assert torch.ops.higher_order.cond not in targets(result)
    assert aten.where.self in targets(result)
    for x in BOTH_WAYS:
        assert torch.equal(result.gm(x)[0], pure(x))
        assert torch.equal(program.gm(x)[0], pure(x))


@pytest.mark.parametrize(("known", "expected"), [(True, plus_one), (False, doubled)])
def test_a_known_predicate(known: bool, expected: Callable[[Tensor], Tensor]) -> None:
    program = traced(pure, BOTH_WAYS[0]).copy()
    cond = call(program, torch.ops.higher_order.cond)
    cond.args = (known, *cond.args[1:])
    result, outcome = attempt(RemoveControlFlow(), program)
    assert outcome.matched == 1
    assert torch.ops.higher_order.cond not in targets(result)
    assert aten.where.self not in targets(result)
    for x in BOTH_WAYS:
        assert torch.equal(result.gm(x)[0], expected(x))


def test_a_branch_that_writes_is_left_alone() -> None:
    program = traced(mutating, BOTH_WAYS[0])
    result, outcome = attempt(RemoveControlFlow(), program)
    assert_refused(program, outcome, "cond chooses between branches", "add_", "writes in place")
    assert torch.ops.higher_order.cond in targets(result)
    for x in BOTH_WAYS:
        assert torch.equal(result.gm(x)[0], mutating(x))


@pytest.mark.parametrize("function", [nested, nested_mutating])
def test_nested_branches(function: Callable[[Tensor], Tensor]) -> None:
    result, _ = attempt(RemoveControlFlow(), traced(function, BOTH_WAYS[0]))
    for x in [*BOTH_WAYS, BOTH_WAYS[0] * 100]:
        assert torch.equal(result.gm(x)[0], function(x))


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x + 1
    return y * 2


def without_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x @ x.T
    return y * 2


def with_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.T
    return y * 2


@pytest.mark.parametrize("function", [without_grad, without_autocast, with_autocast])
def test_wrappers(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, 3)
    result, _ = attempt(RemoveControlFlow(), traced(function, x))
    found, expected = result.gm(x)[0], function(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def value_is_scaled_behind_the_expand(program: Program) -> None:
    attention = call(program, aten.scaled_dot_product_attention.default)
    replaced(attention, 2, before(program, attention, aten.mul.Tensor, attention.args[2], 2.0))


def value_is_scaled_at_the_cache(program: Program) -> None:
    write = call(program, aten.index_copy_.default, 1)
    with program.graph.inserting_after(write):
        scaled = program.graph.call_function(aten.mul.Tensor, (write, 2.0))
    write.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


@pytest.mark.parametrize(("heads", "edit"), [(2, value_is_scaled_behind_the_expand), (1, value_is_scaled_at_the_cache)])
def test_a_value_that_is_scaled_on_the_way(heads: int, edit: Edit) -> None:
    with edited(static("llama", num_key_value_heads=heads)) as program:
        edit(program)
    result, _ = attempt(GroupedAttention(), program)
    assert_same_numbers(program, result)


def test_tables_that_are_written_later_are_not_shared() -> None:
    class Tables(nn.Module):
        def forward(self, position_ids: Tensor) -> Tensor:
            a, b = position_ids * 1.0, position_ids * 1.0
            a.add_(1)
            return a + b

    x = torch.arange(3)[None]
    program = traced_module(Tables(), x)
    result, _ = apply(Rotary(), program)
    assert torch.equal(result.gm(x)[0], program.gm(x)[0])


class PerToken(Product):
    """Logits times something of each token: as many rows as tokens were fed."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * x.mean(-1, keepdim=True)


def test_a_factor_per_token_behind_the_head() -> None:
    stock = tiny("llama", num_hidden_layers=1)
    stock.lm_head = PerToken(stock.lm_head)
    fast: Any = fxopt.optimize(stock, 32, backend="eager")
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()


def test_refused_for_the_key_alone() -> None:
    """V could be written in place, K not: the sentence about K must be what is said."""
    with edited(captured()) as program:
        into_logits(program, program.placeholders()[key_name(0)])
    _, outcome = attempt(StaticKV(), program)
    assert_refused(program, outcome, "key_0 is read by", "not by one cat")
    with pytest.raises(RewriteError, match=r"needed in full: .*key_0 is read by"):
        require(StaticKV(), outcome)


def test_a_bias_computed_in_the_graph() -> None:
    with edited(static("qwen2")) as program:
        k = call(program, aten.linear.default, 1)
        replaced(k, 2, before(program, k, aten.mul.Tensor, k.args[2], 2.0))
    result, outcome = attempt(FuseQKV(), program)
    assert_same_numbers(program, result)
    assert outcome.matched == 0
    assert_refused(program, outcome, "computed in the graph")


@dataclasses.dataclass(frozen=True)
class Crashes(Pass[Any]):
    """Picks a row that is not there: found out when the graph is run."""

    name = "crashes"
    summary = "raises while the graph runs"

    def find(self, program: Program) -> Iterator[Any]:
        yield RowsOfLogits(program.logits())

    def rewrite(self, program: Program, site: Any) -> None:
        index = before(program, program.output(), aten.full.default, [1], 99999)
        index.kwargs = {"dtype": torch.long}
        into_logits(program, before(program, program.output(), aten.index_select.default, site.node, 1, index))


@dataclasses.dataclass(frozen=True)
class RowsOfLogits:
    node: Node


def test_a_pass_whose_graph_crashes_is_dropped() -> None:
    stock = tiny("llama", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="crashes"):
        fast: Any = fxopt.optimize(stock, 32, backend="eager", passes=["fuse_qkv", Crashes()])
    assert next(o for o in fast.fxopt.report.passes if o.name == "crashes").dropped
    with pytest.raises(fxopt.FxoptError, match="crashes"):
        fxopt.optimize(stock, 32, backend="eager", passes=["fuse_qkv", Crashes()], strict=True)


def test_a_selection_that_is_no_collection() -> None:
    with pytest.raises(fxopt.InvalidRequestError, match="5"):
        select(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["data", "parameter"])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.down_proj"])
def test_one_weight_that_was_replaced(module: str, how: str) -> None:
    """Packed or not: the old numbers must not be used silently."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    fast: Any = fxopt.optimize(stock, 32, backend="eager", verify="off")
    linear = stock.model.layers[0].get_submodule(module)
    if how == "data":
        linear.weight.data = torch.zeros_like(linear.weight)
    else:
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
    with pytest.raises(fxopt.InvalidRequestError, match="moved"):
        fast(torch.tensor([[5, 6, 7]]))


def test_the_collector_may_run_while_a_buffer_is_borrowed() -> None:
    """In a thread, so that the dead lock is a failure and not a hang."""
    facts = Facts((KVShape(2, 16, 2, 16),), 64, 32, torch.float32, torch.device("cpu"), 0, 0, 0, tuple)
    pool = caches.BufferPool(facts)

    class Collecting(caches.BufferSet):
        def __init__(self, *args: Any) -> None:
            gc.collect()  # as may happen at any allocation
            super().__init__(*args)

    def borrow() -> None:
        held: Any = caches.BufferCache(pool, facts, 1)
        held.itself = held  # part of a cycle, as an exception's traceback makes it
        del held
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caches, "BufferSet", Collecting)
            pool.borrow(2)

    thread = threading.Thread(target=borrow, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
