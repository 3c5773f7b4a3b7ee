"""Caches that static_kv and window_kv must leave alone: the sentence, the node, the unchanged program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edited_programs import (
    Edit,
    assert_refused,
    assert_same_numbers,
    attempt,
    before,
    call,
    captured,
    edited,
    into_logits,
    parts_of,
    replaced,
    static,
)
from torch.fx import Node

from fxopt.driver import require
from fxopt.errors import RewriteError
from fxopt.listing import readable
from fxopt.passes.static_kv import StaticKV
from fxopt.passes.window_kv import WindowKV
from fxopt.program import CACHE_POSITION, Program, key_name, value_name

aten = torch.ops.aten
END = 2**63 - 1


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


def test_refused_for_the_key_alone() -> None:
    """V could be written in place, K not: the sentence about K must be what is said."""
    with edited(captured()) as program:
        into_logits(program, program.placeholders()[key_name(0)])
    _, outcome = attempt(StaticKV(), program)
    assert_refused(program, outcome, "key_0 is read by", "not by one cat")
    with pytest.raises(RewriteError, match=r"needed in full: .*key_0 is read by"):
        require(StaticKV(), outcome)


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
