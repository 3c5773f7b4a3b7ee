"""Each pass on each kind of model: counts, idempotence, unchanged input, results, and the text it produces."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.driver import apply
from fxopt.families import FAMILIES
from fxopt.listing import readable
from fxopt.passes import DEFAULT_PASSES, PASSES
from fxopt.program import Program
from fxopt.rewrite import Stage
from fxopt.specialise import Role, specialise
from fxopt.testing import check_pass, graph_of

GOLDEN = Path(__file__).parent / "golden"
SYMBOLIC = [kind for kind in DEFAULT_PASSES if kind.stage is Stage.SYMBOLIC]
BY_NAME = {kind.name: kind for kind in PASSES}

#: name -> (matched on llama, how many more or less of an operator)
LLAMA = {
    "remove_control_flow": (39, {"aten._assert_tensor_metadata.default": -17}),
    "static_kv": (4, {"aten.cat.default": -4, "aten.index_copy_.default": 4}),
    "grouped_attention": (2, {"aten.expand.default": -4, "aten.scaled_dot_product_attention.default": 0}),
    "window_kv": (4, {"aten.slice.Tensor": 4}),
    "fuse_qkv": (2, {"aten.linear.default": -4, "aten.split_with_sizes.default": 2}),
    "fuse_gate_up": (2, {"aten.linear.default": -2, "aten.split_with_sizes.default": 2}),
    "rotary": (4, {"aten.cat.default": -3, "aten.neg.default": -3, "aten.flip.default": 4}),
    "last_logits": (1, {"aten.index_select.default": 1}),
    "quantize_kv": (4, {"aten.index_copy_.default": 4, "aten.amax.default": 4, "aten.slice.Tensor": 4}),
    "quantize_weights": (9, {"aten.linear.default": 0, "aten.mul.Tensor": 9, "aten.cat.default": -4}),
    "decode_attention": (2, {"aten.scaled_dot_product_attention.default": -2, "aten.softmax.int": 2}),
    "matvec": (9, {"aten.linear.default": -9}),
}


def test_every_pass_has_a_row() -> None:
    assert list(LLAMA) == [kind.name for kind in PASSES if kind.stage is not Stage.CODE]  # those rewrite no graph


@pytest.mark.pinned
@pytest.mark.parametrize("name", LLAMA)
def test_ops_and_golden_text_on_llama(name: str, update_golden: bool) -> None:
    """The second layer after each pass, as text: a change of what a pass writes is seen in review."""
    matched, changes = LLAMA[name]
    outcomes = check_pass(
        BY_NAME[name](), ["llama"], matched={"llama": matched}, golden=GOLDEN, update_golden=update_golden
    )
    assert not outcomes["llama"].refused
    assert {op: outcomes["llama"].ops.get(op, 0) for op in changes} == changes


@pytest.mark.parametrize("name", LLAMA)
def test_every_family(name: str) -> None:
    """As many places as expected, a second time none, new nodes stamped, the result that of the stock model."""
    check_pass(BY_NAME[name](), FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_all_of_them_made_leaves_nothing_to_do_for_any(family: str) -> None:
    final = graph_of(family)
    for kind in SYMBOLIC:
        again, outcome = apply(kind(), final)
        assert outcome.matched == 0, outcome
        assert readable(again) == readable(final)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nodes_of_every_pass_are_stamped_and_have_shapes(family: str) -> None:
    stamps = set()
    for node in graph_of(family).graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node
            stamps.update(node.meta.get("fxopt", ()))
    assert {"static_kv", "window_kv", "last_logits"} <= stamps


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_specialised_graphs_hold_only_the_sizes_that_vary(family: str, batch: int) -> None:
    decode = specialise(graph_of(family), Role("decode", batch, longest_step=1))
    prefill = specialise(graph_of(family), Role("prefill", batch, longest_step=16))
    assert len(_symbols(decode)) == 1  # the window
    assert len(_symbols(prefill)) == 2  # the window and the step


def _symbols(program: Program) -> set[object]:
    found: set[object] = set()
    for node in program.placeholders().values():
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                found |= set(size.node.expr.free_symbols)
    return found
