"""The pass ``linear_library``: the same products by another library, chosen by a clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_models import specialised
from torch import Tensor

import fxopt
from fxopt import choices, linear_timing
from fxopt.artifact import operators
from fxopt.driver import apply, op_counts
from fxopt.errors import ArtifactError, InvalidRequestError
from fxopt.families import FAMILIES, tiny
from fxopt.linear_timing import timed_linears
from fxopt.onednn import is_built_in, onednn_linear
from fxopt.passes import linear_library
from fxopt.passes.linear_library import LinearLibrary
from fxopt.pipeline import Pipeline, Policy
from fxopt.program import Program
from fxopt.timed_forms import FormTime, TimedForms
from fxopt.views import Linear

pytestmark = pytest.mark.skipif(not is_built_in(), reason="this PyTorch was built without oneDNN")

ATEN, ONEDNN = "aten.linear.default", "fxopt.onednn_linear.default"
INSISTING = {"linear_library": {"library": "onednn"}}
PROMPT = torch.arange(1, 24).reshape(1, -1)


def told(program: Program, **microseconds: float) -> Program:
    """The same graph, as if the libraries had taken so long."""
    times = tuple(FormTime(library, value / 1e6) for library, value in microseconds.items())
    facts = dataclasses.replace(program.facts, linears=TimedForms("64 rows, 5 products", times))
    return dataclasses.replace(program, facts=facts)


def tokens(model: Any, prompt: Tensor = PROMPT) -> list[list[int]]:
    mask = torch.ones_like(prompt)
    said: list[list[int]] = model.generate(prompt, max_new_tokens=8, do_sample=False, attention_mask=mask).tolist()
    return said


# --- the operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [(1, 32), (5, 32), (2, 3, 32)])
def test_the_operator_is_linear(sizes: Sequence[int], biased: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*sizes, generator=random), torch.randn(16, 32, generator=random)
    bias = torch.randn(16, generator=random) if biased else None
    torch.testing.assert_close(onednn_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    torch.library.opcheck(onednn_linear, (x, weight, bias))


def test_rows_may_lie_apart() -> None:
    x, weight = torch.randn(6, 64)[:, ::2], torch.randn(16, 32)
    torch.testing.assert_close(onednn_linear(x, weight, None), torch.nn.functional.linear(x, weight))


# --- the rewrite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_product_of_every_family(family: str) -> None:
    before = specialised(family, "prefill", None)
    linears = op_counts(before)[ATEN]
    after, outcome = apply(LinearLibrary("onednn"), before)
    assert outcome.matched == outcome.expected == linears
    assert op_counts(after)[ONEDNN] == linears
    assert ATEN not in op_counts(after)
    assert outcome.ops == ({ATEN: -linears, ONEDNN: linears} if linears else {})
    again, second = apply(LinearLibrary("onednn"), after)
    assert second.matched == 0
    assert op_counts(again) == op_counts(after)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma2", "mixtral", "phi"])
def test_the_tokens_are_those_of_the_stock_model(family: str) -> None:
    stock = tiny(family)
    fast = fxopt.optimize(stock, 64, chunk=16, max_batch=2, backend="aot_eager", strict=True, passes=INSISTING)
    outcome = fast.fxopt.report["linear_library"]
    assert outcome.matched == outcome.expected > 0
    assert all(spot.source for spot in outcome.sites)
    assert tokens(fast) == tokens(stock)
    pair = torch.cat([PROMPT, PROMPT.flip(1)])
    assert tokens(fast, pair) == tokens(stock, pair)
    assert fast.fxopt.stats["eager"] == 0


def test_text_of_a_layer() -> None:
    after, _ = apply(LinearLibrary("onednn"), specialised("llama", "prefill", 1))
    calls = [node for node in after.graph.nodes if node.target is onednn_linear]
    assert all(node.meta["fxopt"][-1] == "linear_library" for node in calls)
    text = str(calls[0].format_node())
    assert "fxopt.onednn_linear.default](args = (%" in text
    assert text.endswith("None), kwargs = {})")


# --- what is left alone --------------------------------------------------------------------------


@cache
def prefill(family: str = "llama") -> Program:
    return specialised(family, "prefill", 1)


def edited(program: Program, edit: Callable[[Linear], None]) -> Program:
    """The same with other values behind the operands of its first product."""
    draft = program.copy()
    with draft.fake_mode:
        edit(next(Linear.all(draft)))
    return draft


def wide_weight(site: Linear) -> None:
    rows, width = site.weight.meta["val"].shape
    site.weight.meta["val"] = torch.empty(rows, 2 * width)[:, ::2]


def wide_bias(site: Linear) -> None:
    assert site.bias is not None
    site.bias.meta["val"] = torch.empty(2 * site.rows)[::2]


def single_bias(site: Linear) -> None:
    assert site.bias is not None
    site.bias.meta["val"] = torch.empty(1)


def in_bfloat16(program: Program) -> Program:
    draft = program.copy()
    for site in Linear.all(draft):
        site.node.meta["val"] = site.node.meta["val"].to(torch.bfloat16)
    return draft


@pytest.mark.parametrize(
    ("library", "program", "sentence"),
    [
        ("aten", prefill, 'library="aten" was asked for'),
        ("auto", prefill, "no library was timed, as optimize does where weights are large"),
        ("auto", lambda: told(prefill(), aten=10, onednn=20), "PyTorch's own choice was quickest: aten 10 µs, onednn"),
        ("auto", lambda: told(prefill(), aten=10, onednn=9.5), "PyTorch's own choice was quickest"),  # not by much
        ("onednn", lambda: edited(prefill(), wide_weight), "do not lie one behind the other"),
        ("onednn", lambda: edited(prefill("qwen2"), wide_bias), "is not 128 numbers one behind the other"),
        ("onednn", lambda: edited(prefill("qwen2"), single_bias), "is not 128 numbers one behind the other"),
    ],
)
def test_refusals(library: Any, program: Any, sentence: str) -> None:
    _, outcome = apply(LinearLibrary(library), program())
    assert sentence in outcome.refused[0].reason
    assert outcome.expected == outcome.matched


def test_half_precision_goes_through_onednn_anyway() -> None:
    _, outcome = apply(LinearLibrary("onednn"), in_bfloat16(prefill()))
    assert outcome.matched == outcome.expected == 0
    assert not outcome.refused


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_library, "is_built_in", lambda: False)
    monkeypatch.setattr(linear_library, "LEAST_NUMBERS", 1)
    _, outcome = apply(LinearLibrary("onednn"), prefill())
    assert outcome.expected == outcome.matched == 0
    assert outcome.refused[0].reason == "this PyTorch was built without oneDNN"
    assert LinearLibrary().candidates(prefill()) == ()


def test_a_library_that_there_is_not() -> None:
    with pytest.raises(InvalidRequestError, match="library='blas' is none; there are auto, onednn, aten"):
        fxopt.optimize(tiny("llama"), 64, passes={"linear_library": {"library": "blas"}})


# --- the clock -----------------------------------------------------------------------------------


def test_only_large_weights_are_worth_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LinearLibrary().candidates(prefill()) == ()
    monkeypatch.setattr(linear_library, "LEAST_NUMBERS", 64 * 64)
    assert LinearLibrary().candidates(prefill()) == ("aten", "onednn")
    assert LinearLibrary("onednn").candidates(prefill()) == ()


def test_all_products_are_timed_and_long_weights_count_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in of at most 32 rows of 64 numbers: a weight of 256 rows takes eight times as long."""
    asked: set[tuple[int, ...]] = set()

    def clock(libraries: Sequence[str], x: Tensor, weight: Tensor) -> Mapping[str, float]:
        asked.add(tuple(weight.shape))
        return {"aten": 2e-6, "onednn": 1e-6}

    monkeypatch.setattr(linear_timing, "MOST_NUMBERS", 32 * 64)
    monkeypatch.setattr(linear_timing, "_in_turns", clock)
    program = prefill()
    found = timed_linears(program, ("aten", "onednn"), LinearLibrary())
    *sites, _ = Linear.all(program)  # the last is the head, of which a prompt needs one row
    shapes = [tuple(site.weight.meta["val"].shape) for site in sites]
    assert asked == {(min(rows, 32 * 64 // width), width) for rows, width in shapes}
    parts = sum(rows / min(rows, 32 * 64 // width) for rows, width in shapes)
    assert [one.seconds for one in found.times] == [pytest.approx(2e-6 * parts), pytest.approx(1e-6 * parts)]
    assert found.quickest == "onednn"


def test_a_real_clock() -> None:
    found = timed_linears(prefill(), ("aten", "onednn"), LinearLibrary())
    assert all(one.seconds is not None and one.seconds > 0 for one in found.times)


class Clock:
    """Says that oneDNN is twice as quick, and counts how often it is asked."""

    def __init__(self, trouble: str = "") -> None:
        self.asked = 0
        self.trouble = trouble

    def __call__(self, *_: Any) -> TimedForms:
        self.asked += 1
        if self.trouble:
            raise RuntimeError(self.trouble)
        return TimedForms("64 rows, 9 products", (FormTime("aten", 2e-5), FormTime("onednn", 1e-5)))


def timing_with(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(linear_library, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(choices, "timed_linears", clock)


def test_optimize_times_libraries_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timing_with(monkeypatch, clock := Clock())
    stock = tiny("llama")
    fast = fxopt.optimize(stock, 64, chunk=16, backend="aot_eager")
    report = fast.fxopt.report
    assert (
        report["linear_library"].matched == report["linear_library"].expected == 9
    )  # with Q, K and V as one, gate too
    assert "matrix products: onednn; timed: aten 20 µs, onednn 10 µs for 64 rows, 9 products" in str(report)
    assert "time matrix products" in report.seconds
    assert report.diff("linear_library") == "linear_library changed nothing\n"  # the graphs before it are those shown
    fast.fxopt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved", stock)
    assert clock.asked == 1
    assert again.fxopt.engine.facts.linears == report.linears == again.fxopt.report.linears
    engine = again.fxopt.engine
    assert op_counts(engine.lowered(engine.prefill_role(1)).program)[ONEDNN] == 9
    assert op_counts(engine.lowered(engine.prefill_role(2)).program)[ONEDNN] == 9  # compiled after the load
    assert tokens(again) == tokens(stock)


def test_what_cannot_be_timed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    timing_with(monkeypatch, Clock("no memory left\nand more"))
    with pytest.warns(UserWarning, match="matrix products cannot be timed: no memory left; the library's kernel stays"):
        fast = fxopt.optimize(tiny("llama"), 64, chunk=16, backend="aot_eager")
    assert fast.fxopt.report["linear_library"].matched == 0


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timing_with(monkeypatch, clock := Clock())
    fast = fxopt.optimize(tiny("llama"), 64, chunk=16, backend="aot_eager", passes={"linear_library": False})
    assert clock.asked == 0
    assert "linear_library" not in [one.name for one in fast.fxopt.report.passes]
    engine = fast.fxopt.engine
    assert ONEDNN not in op_counts(engine.lowered(engine.prefill_role(1)).program)


def test_a_library_that_computes_something_else_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As any pass that speaks to the compiler: compiled code is compared, and it is tried without the pass."""

    def wrong(self: LinearLibrary, program: Program, site: Linear) -> None:
        with program.graph.inserting_before(site.node):
            doubled = program.graph.call_function(torch.ops.aten.add.Tensor, (site.x, site.x))
            result = program.graph.call_function(onednn_linear, (doubled, site.weight, site.bias))
        site.node.replace_all_uses_with(result)
        program.graph.erase_node(site.node)

    monkeypatch.setattr(LinearLibrary, "rewrite", wrong)
    stock = tiny("llama")
    with pytest.warns(UserWarning, match="with linear_library applied, .*goes on without it"):
        fast = fxopt.optimize(stock, 64, chunk=16, backend="aot_eager", passes=INSISTING)
    assert fast.fxopt.report["linear_library"].dropped
    assert "matrix products" not in str(fast.fxopt.report)
    assert tokens(fast) == tokens(stock)


def test_one_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the first graph that is compiled, when every graph before it has been verified."""

    def failing(self: LinearLibrary, program: Program, site: Linear) -> None:
        site.node.args = ()
        raise LookupError("no such library\nand more")

    monkeypatch.setattr(LinearLibrary, "rewrite", failing)
    stock = tiny("llama")
    with pytest.warns(UserWarning, match="linear_library failed with LookupError: no such library; fxopt goes on"):
        fast = fxopt.optimize(stock, 64, chunk=16, backend="aot_eager", passes=INSISTING)
    assert fast.fxopt.report["linear_library"].dropped == "linear_library failed with LookupError: no such library"
    assert tokens(fast) == tokens(stock)
    with pytest.raises(fxopt.RewriteError, match=r"no such library\. The stock model is unchanged"):
        fxopt.optimize(stock, 64, chunk=16, backend="aot_eager", passes=INSISTING, strict=True)
    with pytest.warns(UserWarning, match="no such library; fxopt goes on"):
        report = fxopt.explain(stock, 64, passes=INSISTING)
    assert report["linear_library"].dropped


def test_who_changes_nothing_is_no_suspect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling everything anew without it would show nothing."""
    pipeline = Pipeline([LinearLibrary(), LinearLibrary("onednn")], prefill(), Policy())
    assert pipeline.suspects() == [LinearLibrary("onednn")]


def test_the_head_is_not_timed_for_every_token() -> None:
    program = specialised("llama", "prefill", 1)
    found = timed_linears(program, ("aten",), LinearLibrary())
    assert found.setting == f"64 rows, {len(list(Linear.all(program))) - 1} products"


@pytest.mark.parametrize("why_not", [None, "it makes none"])
def test_beside_a_plan_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, why_not: str | None) -> None:
    """Unless there is no arena after all."""
    timing_with(monkeypatch, clock := Clock())
    monkeypatch.setattr(choices, "unplaceable", lambda backend, device: why_not)
    with pytest.warns(UserWarning, match="plan_memory can do nothing"):  # without Inductor
        fast = fxopt.optimize(tiny("llama"), 64, chunk=16, backend="aot_eager", passes={"plan_memory": True})
    assert clock.asked == (why_not is not None)
    assert (fast.fxopt.report.linears is None) == (why_not is None)


def test_a_saved_graph_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "is_built_in", lambda: False)
    with pytest.raises(ArtifactError, match="multiplies by oneDNN, and this PyTorch was built without it"):
        operators.operator_of(ONEDNN)


@pytest.mark.slow
def test_through_inductor_and_as_a_package(tmp_path: Path) -> None:
    stock = tiny("llama", layers=4)
    fast = fxopt.optimize(stock, 64, chunk=16, compile="layer", strict=True, passes=INSISTING)
    assert fast.fxopt.report["linear_library"].matched == 17
    assert tokens(fast) == tokens(stock)
    fast.fxopt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved", stock)
    assert tokens(again) == tokens(stock)
    engine = again.fxopt.engine
    assert op_counts(engine.lowered(engine.prefill_role(1)).program)[ONEDNN] == 17
