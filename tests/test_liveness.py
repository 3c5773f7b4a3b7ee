"""Which memory a graph makes, and from when until when: aliases, writes, tuples, dead values, bodies, places taken."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from planned_models import captured, specialised
from torch import Tensor
from traced import branching, layouts, traced

from fxopt.errors import InvalidRequestError
from fxopt.in_place_slots import in_all, in_place
from fxopt.liveness import Liveness, liveness
from fxopt.outline import outline
from fxopt.shape_sets import Axes, default_shape_sets, examples
from fxopt.symbolic_bytes import symbolic_bytes

aten = torch.ops.aten
FLOATS = torch.randn(4, 8)  # 128 bytes


def lives(live: Liveness) -> dict[str, tuple[str, int, int, int]]:
    return {name: (one.kind, one.start, one.end, one.nbytes) for name, one in live.storages.items()}


def test_a_value_lives_from_its_call_to_its_last_reader() -> None:
    def chain(x: Tensor) -> Any:
        a = aten.add.Tensor(x, 1.0)
        b = aten.neg.default(a)
        return aten.mul.Tensor(a, b)

    live = liveness(traced(chain), layouts(FLOATS))
    assert lives(live) == {
        "add_tensor": ("activation", 0, 3, 128),
        "neg_default": ("activation", 1, 3, 128),
        "mul_tensor": ("output", 2, 3, 128),
    }


def test_views_keep_their_base_alive_and_have_no_memory_of_their_own() -> None:
    def views(x: Tensor) -> Any:
        a = aten.add.Tensor(x, 1.0)
        rows = aten.slice.Tensor(aten.transpose.int(a, 0, 1), 0, 0, 2)
        b = aten.neg.default(x)
        return aten.add.Tensor(aten.sum.dim_IntList(rows, [0, 1]), aten.sum.dim_IntList(b, [0, 1]))

    live = liveness(traced(views), layouts(FLOATS))
    assert (live.storages["add_tensor"].start, live.storages["add_tensor"].end) == (0, 5)
    assert "transpose_int" not in live.storages
    assert "slice_tensor" not in live.storages
    (leaf,) = live.leaves["slice_tensor"]
    assert leaf is not None
    assert leaf.storage == "add_tensor"


@pytest.mark.parametrize("copies", [False, True])
def test_ops_that_may_alias_are_judged_by_what_they_do(copies: bool) -> None:
    def maybe(x: Tensor) -> Any:
        a = aten.add.Tensor(x, 1.0)
        a = aten.transpose.int(a, 0, 1) if copies else a
        flat = aten.reshape.default(a, [-1])
        dense = aten.contiguous.default(flat)
        same = aten.to.dtype(dense, torch.float64 if copies else torch.float32)
        return aten.neg.default(same)

    live = liveness(traced(maybe), layouts(FLOATS))
    made = {"add_tensor", "reshape_default", "to_dtype"} if copies else {"add_tensor"}
    assert set(live.storages) == made | {"neg_default"}


def test_nodes_that_share_a_fake_value_do_not_share_memory() -> None:
    def twins(x: Tensor) -> Any:
        return aten.mul.Tensor(aten.add.Tensor(x, 1.0), aten.add.Tensor(x, 1.0))

    gm = traced(twins)
    first, second = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    first.meta["val"] = second.meta["val"] = FLOATS  # as propagate leaves them
    assert {"add_tensor", "add_tensor_1"} <= set(liveness(gm, layouts(FLOATS)).storages)


def test_what_is_written_into_an_input_stays_outside() -> None:
    def write(buffer: Tensor, rows: Tensor, x: Tensor) -> Any:
        a = aten.add.Tensor(x, 1.0)
        kept = aten.index_copy_.default(buffer, 0, rows, a)
        return aten.neg.default(aten.slice.Tensor(kept, 0, 0, 2))

    live = liveness(traced(write), layouts(torch.zeros(16, 8), torch.arange(4), FLOATS))
    assert set(live.storages) == {"add_tensor", "neg_default"}
    assert live.leaves["index_copy__default"][0] is not None
    assert live.leaves["index_copy__default"][0].storage is None


def test_what_is_written_into_an_activation_is_the_same_memory() -> None:
    def write(x: Tensor, rows: Tensor) -> Any:
        room = aten.empty_like.default(x)
        filled = aten.index_put_.default(room, [rows], x)
        halved = aten.div_.Tensor(filled, 2.0)
        return aten.neg.default(halved)

    live = liveness(traced(write), layouts(FLOATS, torch.arange(4)))
    assert lives(live)["empty_like_default"] == ("activation", 0, 4, 128)
    assert set(live.storages) == {"empty_like_default", "neg_default"}


def test_a_schema_that_promises_to_write_is_believed_over_a_fake_that_copies() -> None:
    library = torch.library.Library("fxopt_test_liveness", "FRAGMENT")
    library.define("bump_(Tensor(a!) x) -> Tensor(a!)")
    library.impl("bump_", lambda x: x.add_(1), "CPU")
    library.impl("bump_", lambda x: torch.empty_like(x), "Meta")
    op = torch.ops.fxopt_test_liveness.bump_.default

    def bumped(x: Tensor) -> Any:
        return aten.neg.default(op(aten.add.Tensor(x, 1.0)))

    assert set(liveness(traced(bumped), layouts(FLOATS)).storages) == {"add_tensor", "neg_default"}


def test_parts_of_a_tuple_live_each_for_themselves() -> None:
    def best(x: Tensor) -> Any:
        found = aten.topk.default(x, 2)
        values, places = operator.getitem(found, 0), operator.getitem(found, 1)
        doubled = aten.mul.Tensor(values, 2.0)
        return doubled, aten.neg.default(aten.add.Tensor(places, 1))

    live = liveness(traced(best), layouts(FLOATS))
    assert lives(live)["topk_default.0"] == ("activation", 0, 4, 32)
    assert lives(live)["topk_default.1"] == ("activation", 0, 5, 64)


def test_parts_that_are_views_are_no_memory_of_their_own() -> None:
    def halves(x: Tensor) -> Any:
        parts = aten.split.Tensor(aten.add.Tensor(x, 1.0), 4, 1)
        return aten.mul.Tensor(operator.getitem(parts, 0), operator.getitem(parts, 1))

    assert set(liveness(traced(halves), layouts(FLOATS)).storages) == {"add_tensor", "mul_tensor"}


def test_dead_values_need_room_while_they_are_made() -> None:
    def dead(x: Tensor) -> Any:
        aten.add.Tensor(x, 1.0)
        return aten.neg.default(x)

    assert lives(liveness(traced(dead), layouts(FLOATS)))["add_tensor"] == ("activation", 0, 1, 128)


def test_outputs_live_to_the_end_and_have_no_place_in_the_arena() -> None:
    def early(x: Tensor) -> Any:
        first = aten.add.Tensor(x, 1.0)
        view = aten.slice.Tensor(first, 0, 0, 2)
        return view, aten.neg.default(aten.mul.Tensor(x, 2.0))

    live = liveness(traced(early), layouts(FLOATS))
    assert lives(live)["add_tensor"] == ("output", 0, 4, 128)
    assert [buffer.name for buffer in live.problem.buffers] == ["mul_tensor"]


def test_bytes_are_those_of_the_storage() -> None:
    def strided(x: Tensor) -> Any:
        room = aten.new_empty_strided.default(x, [4, 8], [16, 1])
        return aten.neg.default(room)

    assert liveness(traced(strided), layouts(FLOATS)).storages["new_empty_strided_default"].nbytes == (3 * 16 + 8) * 4


def test_the_body_of_control_flow_is_charged_at_its_node() -> None:
    live = liveness(branching(), layouts(torch.tensor(True), FLOATS))
    # cat and neg of three times x at once; then neg and its clone
    assert lives(live)["cond.workspace"] == ("workspace", 0, 1, 2 * 3 * 128)
    assert lives(live)["cond.0"] == ("activation", 0, 3, 128)


def test_sizes_that_depend_on_data_are_refused_with_the_name_of_the_node() -> None:
    def data(x: Tensor) -> Any:
        return aten.nonzero.default(x)

    with pytest.raises(InvalidRequestError, match=r"nonzero_default .* no result that is known from shapes"):
        liveness(traced(data), layouts(FLOATS))


def test_inputs_are_counted() -> None:
    with pytest.raises(InvalidRequestError, match="has 1 inputs, and 0 were described"):
        liveness(traced(lambda x: aten.neg.default(x)), [])


# In place


def taken(function: Callable[..., Any], *inputs: Tensor) -> dict[str, str]:
    gm = traced(function)
    return dict(in_place(gm, liveness(gm, layouts(*inputs))).in_place)


def test_a_result_takes_the_place_of_an_operand_that_dies() -> None:
    def chain(x: Tensor) -> Any:
        a = aten.add.Tensor(x, 1.0)
        b = aten.softmax.int(aten.neg.default(a), -1)
        return aten.sum.dim_IntList(b, [0])

    gm = traced(chain)
    live = in_place(gm, liveness(gm, layouts(FLOATS)))
    assert live.in_place == {"neg_default": "add_tensor", "softmax_int": "neg_default"}
    assert live.slot("softmax_int") == "add_tensor"
    (buffer,) = live.problem.buffers
    assert (buffer.name, buffer.start, buffer.end) == ("add_tensor", 0, 4)


def _input(x: Tensor) -> Any:
    return aten.sum.dim_IntList(aten.neg.default(x), [0])


def _read_later(x: Tensor) -> Any:
    a = aten.cat.default([x, x])
    b = aten.neg.default(a)
    return aten.sum.dim_IntList(aten.matmul.default(a, aten.transpose.int(b, 0, 1)), [0])


def _other_operand_overlaps(x: Tensor) -> Any:
    a = aten.cat.default([x, x])  # twice four rows of eight are a square
    return aten.sum.dim_IntList(aten.add.Tensor(a, aten.transpose.int(a, 0, 1)), [0])


def _broadcast(x: Tensor) -> Any:
    a = aten.sum.dim_IntList(x, [0], True)
    return aten.sum.dim_IntList(aten.mul.Tensor(a, x), [0])


def _another_dtype(x: Tensor) -> Any:
    a = aten.cat.default([x, x])
    return aten.sum.dim_IntList(aten.le.Scalar(a, 0.0), [0])


def _other_strides(x: Tensor) -> Any:
    a = aten.transpose.int(aten.cat.default([x, x]), 0, 1)
    y = aten.cat.default([x, x])
    z = aten.mul.Tensor(y, a)
    return aten.matmul.default(z, y)


def _part_of_a_larger_one(x: Tensor) -> Any:
    a = aten.slice.Tensor(aten.cat.default([x, x]), 0, 0, 4)
    return aten.sum.dim_IntList(aten.neg.default(a), [0])


def _not_element_by_element(x: Tensor) -> Any:
    return aten.sum.dim_IntList(aten.cumsum.default(aten.cat.default([x, x]), 0), [0])


def _returned(x: Tensor) -> Any:
    a = aten.cat.default([x, x])
    return a, aten.sum.dim_IntList(aten.neg.default(a), [0])


@pytest.mark.parametrize(
    "function",
    [
        _input,
        _read_later,
        _other_operand_overlaps,
        _broadcast,
        _another_dtype,
        _other_strides,
        _part_of_a_larger_one,
        _not_element_by_element,
        _returned,
    ],
)
def test_a_place_is_left_alone(function: Callable[..., Any]) -> None:
    assert taken(function, FLOATS) == {}


def test_the_same_operand_twice_is_no_overlap() -> None:
    def square(x: Tensor) -> Any:
        a = aten.cat.default([x, x])
        return aten.sum.dim_IntList(aten.mul.Tensor(a, a), [0])

    assert taken(square, FLOATS) == {"mul_tensor": "cat_default"}


def test_in_place_is_decided_anew_for_every_shape() -> None:
    def broadcast(x: Tensor, y: Tensor) -> Any:
        a = aten.cat.default([x, x])
        return aten.sum.dim_IntList(aten.add.Tensor(a, y), [0])

    gm = traced(broadcast)
    found = [in_place(gm, liveness(gm, layouts(torch.zeros(1, n), torch.zeros(2, 4)))) for n in (4, 1)]
    assert [dict(live.in_place) for live in found] == [{"add_tensor": "cat_default"}, {}]
    assert [dict(live.in_place) for live in in_all(found)] == [{}, {}]


# Programs


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_symbolic_bytes_are_right_at_every_shape(family: str) -> None:
    program = specialised(family, "prefill", None)
    sets = default_shape_sets(program, chunk=32, batch=3)
    lives_of = [liveness(program.gm, examples(program, shapes)) for shapes in sets]
    found = symbolic_bytes(program, list(zip(sets, lives_of, strict=True)))
    batch, step, window = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "step", "window"))
    assert found["embedding"] == 256 * batch * step
    assert found["arange_3"] == 8 * window
    assert len(found) == len(lives_of[0].storages)
    other = {"batch": 5, "step": 9, "window": 64}
    unseen = liveness(program.gm, examples(program, other))
    numbers = {batch: 5, step: 9, window: 64}
    assert {name: int(size.subs(numbers)) for name, size in found.items()} == {
        name: storage.nbytes for name, storage in unseen.storages.items()
    }


def test_a_captured_graph_with_control_flow_and_a_growing_cache() -> None:
    program = captured("llama")
    assert Axes(program).free == ("batch", "step", "past", "window")
    live = liveness(program.gm, examples(program, {"batch": 2, "step": 3, "past": 5, "window": 8}))
    assert sum(storage.kind == "output" for storage in live.storages.values()) == 5  # logits, keys and values


def test_pieces_of_an_outlined_graph_end_where_the_next_one_starts() -> None:
    program = specialised("llama", "decode", 1, layers=4)
    shapes = {"window": 128}
    pieces = outline(program, layered=True)
    assert len(pieces) == 6
    for piece in pieces:
        live = liveness(piece.module, examples(program, shapes, piece.module))
        assert sum(storage.kind == "output" for storage in live.storages.values()) <= len(piece.outputs)
        assert not [name for name in live.storages if name.startswith("in_")]


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"window": 64}, "has no step; this graph needs a number for each of step, window"),
        ({"step": 3, "window": 0}, "window=0 is no size; give a whole number from 1"),
        ({"step": 3, "window": 64, "beam": 4}, "the graph has no beam; it has batch, step, logits, past, window"),
        ({"step": 3, "window": 64, "batch": 2}, "batch=2 was asked for, but in this graph it is 1"),
    ],
)
def test_shape_sets_that_do_not_fit_are_refused(shapes: dict[str, int], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        examples(specialised("llama", "prefill", 1), shapes)


def test_default_shape_sets_follow_from_the_request() -> None:
    prefill, decode = (specialised("llama", role, 1) for role in ("prefill", "decode"))
    assert default_shape_sets(prefill, chunk=32) == [{"step": 32, "window": 64}, {"step": 32, "window": 256}]
    assert default_shape_sets(decode) == [{"window": window} for window in (64, 128, 192, 256)]
