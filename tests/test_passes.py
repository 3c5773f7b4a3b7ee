"""Each pass on each kind of model: counts, idempotence, unchanged input, and the text it produces."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from families import FAMILIES, tiny

from fxopt.capture import capture
from fxopt.passes import PASSES
from fxopt.program import Program
from fxopt.rewrite import Outcome, Stage, apply, op_counts
from fxopt.specialise import Role, specialise
from fxopt.text import readable

GOLDEN = Path(__file__).parent / "golden"
SYMBOLIC = [kind for kind in PASSES if kind.stage is Stage.SYMBOLIC]


@cache
def stages(family: str) -> tuple[tuple[Outcome, Program], ...]:
    """What every symbolic pass made of one family, in order; the capture first."""
    program = capture(tiny(family), max_len=100, capacity=128)
    results = [(Outcome("capture"), program)]
    for kind in SYMBOLIC:
        program, outcome = apply(kind(), program)
        results.append((outcome, program))
    return tuple(results)


def steps(family: str) -> Iterator[tuple[str, Outcome, Program, Program]]:
    for (_, before), (outcome, after) in zip(stages(family), stages(family)[1:], strict=False):
        yield outcome.name, outcome, before, after


#: name -> (matched on llama, ops that go, ops that come)
LLAMA = {
    "remove_control_flow": (None, {"aten._assert_tensor_metadata.default": -17}, {}),
    "static_kv": (4, {"aten.cat.default": -4}, {"aten.index_copy_.default": 4}),
    "grouped_attention": (2, {"aten.expand.default": -4}, {"aten.scaled_dot_product_attention.default": 0}),
    "window_kv": (4, {}, {"aten.slice.Tensor": 4}),
    "fuse_qkv": (2, {"aten.linear.default": -4}, {"aten.split_with_sizes.default": 2}),
    "fuse_gate_up": (2, {"aten.linear.default": -2}, {"aten.split_with_sizes.default": 2}),
    "rotary": (4, {"aten.cat.default": -3, "aten.neg.default": -3}, {"aten.flip.default": 4}),
    "last_logits": (1, {}, {"aten.index_select.default": 1}),
}


def test_every_pass_has_a_row() -> None:
    assert set(LLAMA) == {kind.name for kind in SYMBOLIC}


@pytest.mark.parametrize("name", LLAMA)
def test_op_counts_on_llama(name: str) -> None:
    matched, fewer, more = LLAMA[name]
    _, outcome, before, after = next(step for step in steps("llama") if step[0] == name)
    assert not outcome.refused
    if matched is not None:
        assert outcome.matched == matched
    if outcome.expected is not None:
        assert outcome.expected == outcome.matched
    counts_before, counts_after = op_counts(before), op_counts(after)
    for op, change in {**fewer, **more}.items():
        assert counts_after.get(op, 0) - counts_before.get(op, 0) == change, op


@pytest.mark.parametrize("family", FAMILIES)
def test_applying_twice_changes_nothing(family: str) -> None:
    final = stages(family)[-1][1]
    for kind in SYMBOLIC:
        again, outcome = apply(kind(), final)
        assert outcome.matched == 0, outcome
        assert readable(again) == readable(final)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_is_matched(family: str) -> None:
    for _, outcome, _, _ in steps(family):
        assert outcome.expected is None or outcome.matched == outcome.expected, outcome


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_program_given_is_never_changed(family: str) -> None:
    captured = stages(family)[0][1]
    text = readable(captured)
    apply(SYMBOLIC[0](), captured)
    assert readable(captured) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_new_nodes_are_stamped_and_have_shapes(family: str) -> None:
    final = stages(family)[-1][1]
    stamps = set()
    for node in final.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node
            stamps.update(node.meta.get("fxopt", ()))
    assert {"static_kv", "window_kv", "last_logits"} <= stamps


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_specialised_graphs_hold_only_the_sizes_that_vary(family: str, batch: int) -> None:
    final = stages(family)[-1][1]
    decode = specialise(final, Role("decode", batch, longest_step=1))
    prefill = specialise(final, Role("prefill", batch, longest_step=16))
    assert len(_symbols(decode)) == 1  # the window
    assert len(_symbols(prefill)) == 2  # the window and the step


def _symbols(program: Program) -> set[object]:
    found: set[object] = set()
    for node in program.placeholders().values():
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                found |= set(size.node.expr.free_symbols)
    return found


@pytest.mark.parametrize("name", [kind.name for kind in SYMBOLIC])
def test_golden_text_of_a_llama_layer(name: str, update_golden: bool) -> None:
    """The second layer after each pass, as text: a change of what a pass writes is seen in review."""
    _, _, _, after = next(step for step in steps("llama") if step[0] == name)
    text = readable(after, layers=[1]) + "\n"
    path = GOLDEN / f"llama_{name}.txt"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), "no golden text; run pytest --update-golden and look at the diff"
    assert text == path.read_text(), "the text changed; run pytest --update-golden and look at the diff"
