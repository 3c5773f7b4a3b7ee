"""Attention and rotations that passes must leave alone: the sentence, the node, the same numbers."""

from __future__ import annotations

import dataclasses
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
    captured,
    decode,
    edited,
    parts_of,
    replaced,
    source_of,
    static,
)

from fxopt.capture import capture
from fxopt.driver import apply
from fxopt.families import tiny
from fxopt.listing import readable
from fxopt.passes.decode_attention import DecodeAttention, Form
from fxopt.passes.grouped_attention import GroupedAttention
from fxopt.passes.matvec import Matvec
from fxopt.passes.rotary import Rotary
from fxopt.passes.window_kv import WindowKV
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.specialise import Role, specialise

aten = torch.ops.aten


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


# --- decode_attention and matvec -----------------------------------------------------------------


@pytest.mark.parametrize("rewriter", [DecodeAttention(), Matvec()])
@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("eager", "cpu", ["only Inductor", "eager would write it out"]),
        ("aot_eager", "cpu", ["only Inductor", "aot_eager would write it out"]),
        ("inductor", "cuda", ["on cuda"]),
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


@pytest.mark.parametrize("form", ["auto", "split"])
def test_a_causal_mask_made_in_the_kernel(form: Form) -> None:
    with edited(decode()) as program:
        attention = call(program, aten.scaled_dot_product_attention.default)
        attention.args = attention.args[:3]
        attention.kwargs = {**attention.kwargs, "is_causal": True}
    result, outcome = attempt(DecodeAttention(form), program)
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
