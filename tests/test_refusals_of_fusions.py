"""Linears that fuse_qkv and fuse_gate_up must leave alone: the sentence, the node, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edited_programs import (
    CAPACITY,
    Edit,
    assert_refused,
    assert_same_numbers,
    attempt,
    before,
    call,
    edited,
    replaced,
    static,
)
from torch import nn
from torch.fx import Node

import fxopt
from fxopt.capture import capture
from fxopt.driver import apply
from fxopt.errors import RewriteError
from fxopt.families import tiny
from fxopt.listing import readable
from fxopt.passes.fuse_gate_up import FuseGateUp
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.passes.static_kv import StaticKV
from fxopt.program import Program
from fxopt.rewrite import Pass

aten = torch.ops.aten


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


def test_a_bias_computed_in_the_graph() -> None:
    with edited(static("qwen2")) as program:
        k = call(program, aten.linear.default, 1)
        replaced(k, 2, before(program, k, aten.mul.Tensor, k.args[2], 2.0))
    result, outcome = attempt(FuseQKV(), program)
    assert_same_numbers(program, result)
    assert outcome.matched == 0
    assert_refused(program, outcome, "computed in the graph")
