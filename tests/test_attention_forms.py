"""The forms of decode attention: what is asked for, what timing chooses, and that each computes the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_programs import assert_refused, assert_same_numbers, attempt, decode, static

import fxopt
from fxopt.attention_timing import timed_attention
from fxopt.driver import op_counts
from fxopt.errors import InvalidRequestError
from fxopt.families import tiny
from fxopt.lower import lower
from fxopt.passes.decode_attention import DecodeAttention, Form
from fxopt.program import Program
from fxopt.replay import Run
from fxopt.testing import check_pass
from fxopt.timed_forms import FormTime, TimedForms
from fxopt.weights import pack

aten = torch.ops.aten
GOLDEN = Path(__file__).parent / "golden" / "split"
SPLIT = "fxopt.split_attention.default"
FORMS: tuple[Form, ...] = ("library", "sums", "split")


def on_a_gpu(program: Program, attention: TimedForms | None = None, **facts: Any) -> Program:
    """The same graph, said to be of a model on a GPU."""
    facts = {"device": torch.device("cuda", 0), "attention": attention, **facts}
    return dataclasses.replace(program, facts=dataclasses.replace(program.facts, **facts))


def timed(**microseconds: float) -> TimedForms:
    times = tuple(FormTime(form, value / 1e6) for form, value in microseconds.items())
    return TimedForms("batch 1, 64 rows, 1 layers", times)


# --- the operator in a graph ---------------------------------------------------------------------


@pytest.mark.pinned
def test_split_on_grouped_heads_and_on_a_head_for_each_query(update_golden: bool) -> None:
    outcomes = check_pass(
        DecodeAttention("split"), ["llama", "gpt2"], matched={"llama": 2}, golden=GOLDEN, update_golden=update_golden
    )
    assert outcomes["llama"].ops == {
        SPLIT: 2,
        "aten.scaled_dot_product_attention.default": -2,
    }


def test_split_gives_the_tokens_of_the_stock_model() -> None:
    stock = tiny("llama")
    prompt = torch.arange(1, 24).reshape(1, -1)
    passes = {"decode_attention": {"form": "split"}}
    fast = fxopt.optimize(stock, 64, passes=passes, backend="aot_eager", verify="off")
    assert fast.fxopt.report["decode_attention"].matched == 2
    want = stock.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(fast.generate(prompt, max_new_tokens=12, do_sample=False), want)


@pytest.mark.slow
def test_inductor_copies_no_cache_for_it() -> None:
    """K and V go into the operator as they lie in the buffers."""
    program, outcome = attempt(DecodeAttention("split"), decode())
    assert outcome.matched == 1
    proof = lower(pack(program), "inductor").proof
    assert proof is not None
    assert (proof.writes, proof.copies) == (2, ())


# --- which form ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "operator"),
    [
        ({"library": 30.0, "sums": 20.0, "split": 10.0}, SPLIT),
        ({"library": 30.0, "sums": 10.0, "split": 20.0}, "aten.softmax.int"),
        ({"library": 10.0, "sums": 20.0, "split": 30.0}, "aten.scaled_dot_product_attention.default"),
    ],
)
def test_the_quickest_form_is_taken(times: dict[str, float], operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes.decode_attention.has_kernels", lambda device: True)
    monkeypatch.setattr("fxopt.passes.decode_attention.processors_of", lambda device: 132)
    program = on_a_gpu(decode(), timed(**times))
    result, outcome = attempt(DecodeAttention(), program)
    assert op_counts(result)[operator] == 1
    assert outcome.is_complete
    if operator.startswith("aten.scaled"):
        assert_refused(program, outcome, "quickest on cuda:0: library 10 µs, sums 20 µs, split 30 µs for batch 1")
    else:
        assert outcome.matched == 1
    again, once_more = attempt(DecodeAttention(), result)
    assert once_more.matched == 0
    assert op_counts(again) == op_counts(result)


def test_what_there_is_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes.decode_attention.has_kernels", lambda device: device.type == "cuda")
    here, there = decode().facts, on_a_gpu(decode()).facts
    assert DecodeAttention().candidates(here) == ()
    assert DecodeAttention("split").candidates(there) == ()
    assert DecodeAttention().candidates(there) == FORMS
    assert DecodeAttention().candidates(dataclasses.replace(there, backend="eager")) == ("library", "split")
    monkeypatch.setattr("fxopt.passes.decode_attention.has_kernels", lambda device: False)
    assert DecodeAttention().candidates(there) == ("library", "sums")
    assert DecodeAttention().candidates(dataclasses.replace(there, backend="eager")) == ()


@pytest.mark.parametrize(
    ("form", "facts", "words"),
    [
        ("library", {}, ['form="library" was asked for']),
        ("auto", {"device": torch.device("cuda", 0)}, ["cuda:0", "nothing was timed"]),
        ("sums", {"backend": "eager"}, ["only Inductor", "eager would write it out"]),
        ("split", {"device": torch.device("cuda", 0)}, ["Triton, which is not installed"]),
    ],
)
def test_forms_that_cannot_be(
    form: Form, facts: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.passes.decode_attention.has_kernels", lambda device: False)
    program = decode()
    program = dataclasses.replace(program, facts=dataclasses.replace(program.facts, **facts))
    result, outcome = attempt(DecodeAttention(form), program)
    assert outcome.matched == 0
    assert_refused(program, outcome, *words)
    assert_same_numbers(program, result)


def test_an_unknown_form() -> None:
    with pytest.raises(InvalidRequestError, match="form='flash' is no form; there are auto, sums, split, library"):
        fxopt.optimize(tiny("llama"), 64, passes={"decode_attention": {"form": "flash"}})


# --- timing --------------------------------------------------------------------------------------


class FakeClock:
    """Runs each form once, and says the times that it was given."""

    def __init__(self, **microseconds: float) -> None:
        self._seconds = {form: value / 1e6 for form, value in microseconds.items()}
        self.ran: list[str] = []

    def __call__(self, runs: Mapping[str, Run]) -> Mapping[str, float]:
        for form, run in runs.items():
            assert run().isfinite().all()
            self.ran.append(form)
        return {form: self._seconds[form] for form in runs}


def test_every_form_is_run_on_the_shapes_of_the_graph() -> None:
    """In eager mode; sums are written out there, which gives the same numbers."""
    program = dataclasses.replace(static(), facts=dataclasses.replace(static().facts, backend="eager"))
    clock = FakeClock(library=40.0, split=20.0)
    found = timed_attention(program, ("library", "split"), 3, clock)
    assert found is not None
    assert clock.ran == ["library", "split"]
    assert found.quickest == "split"
    assert str(found) == "library 20 µs, split 10 µs for batch 3, 64 rows, 1 layers"  # a run goes through two buffers


def test_a_form_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr("fxopt.passes.decode_attention._split", broken)
    program = dataclasses.replace(static(), facts=dataclasses.replace(static().facts, backend="eager"))
    found = timed_attention(program, ("library", "split"), 1, FakeClock(library=40.0))
    assert found is not None
    assert found.quickest == "library"
    assert "split failed (no such instruction)" in str(found)


def test_a_form_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes.decode_attention._scale", lambda site: 3.0)
    program = dataclasses.replace(static(), facts=dataclasses.replace(static().facts, backend="eager"))
    found = timed_attention(program, ("library", "split"), 1, FakeClock(library=40.0))
    assert found is not None
    assert found.quickest == "library"
    assert "away from the library's" in str(found)


@pytest.mark.slow
def test_every_form_through_inductor() -> None:
    program = dataclasses.replace(static(), facts=dataclasses.replace(static().facts, backend="inductor"))
    found = timed_attention(program, FORMS, 1, FakeClock(library=3.0, sums=1.0, split=2.0))
    assert found is not None
    assert found.quickest == "sums", found


def test_optimize_times_forms_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, by a clock that says that split is quickest; a saved model keeps what was found."""
    monkeypatch.setattr(DecodeAttention, "candidates", lambda self, facts: ("library", "split"))
    monkeypatch.setattr("fxopt.attention_timing.on_cuda", FakeClock(library=40.0, split=20.0))
    stock = tiny("llama")
    fast = fxopt.optimize(stock, 64, backend="eager")
    report = fast.fxopt.report
    assert report["decode_attention"].matched == report["decode_attention"].expected == 2
    assert "decode attention: split; timed: library 40 µs, split 20 µs for batch 1, 64 rows, 2 layers" in str(report)
    assert "time decode attention" in report.seconds
    fast.fxopt.save(tmp_path / "saved")
    again = fxopt.load(tmp_path / "saved", stock)
    engine = again.fxopt.engine
    assert engine.facts.attention == report.attention == again.fxopt.report.attention
    assert op_counts(engine.lowered(engine.decode_role(1)).program)[SPLIT] == 2


def test_what_cannot_be_timed_stays_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(DecodeAttention, "candidates", lambda self, facts: ("library", "split"))
    monkeypatch.setattr("fxopt.attention_timing.on_cuda", out_of_memory)
    with pytest.warns(UserWarning, match="cannot be timed: no memory left; the library's kernel stays"):
        fast = fxopt.optimize(tiny("llama", num_hidden_layers=1), 64, backend="eager")
    assert fast.fxopt.report["decode_attention"].matched == 0
