"""Whatever goes wrong on the way, the stock model is as it was, and the sentence says what did."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from untouched import FEW, State, assert_untouched, generate, optimise, outcome_of, raiser

from fxopt.errors import CaptureError, FxoptError, RewriteError
from fxopt.families import tiny
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.static_kv import StaticKV
from fxopt.rewrite import Pass

pytestmark = pytest.mark.usefixtures("no_other_warnings")

ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)


# --- stages of optimize --------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS)
def test_export_fails(
    stock_llama: Any, stock_state: State, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    seen = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        seen.append(stock_llama.config._attn_implementation)
        raise error("injected")

    monkeypatch.setattr("torch.export.export", fail)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CaptureError
    with pytest.raises(expected, match="injected"):
        optimise(stock_llama)
    assert seen == ["sdpa"]
    assert_untouched(stock_llama, stock_state)


def test_the_sentence_of_a_capture_that_fails(stock_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the reason\nand a long tail")

    monkeypatch.setattr("torch.export.export", fail)
    with pytest.raises(CaptureError, match=r"LlamaForCausalLM .*the reason .*stock model is unchanged") as raised:
        optimise(stock_llama)
    assert "long tail" not in str(raised.value)
    assert isinstance(raised.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", ERRORS)
def test_probe_fails(stock_llama: Any, stock_state: State, error: type[BaseException]) -> None:
    """The first run of the model raises."""
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CaptureError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stock_llama.model.layers[0]), "forward", raiser(error))
        with pytest.raises(expected, match="injected"):
            optimise(stock_llama)
    assert_untouched(stock_llama, stock_state)


@pytest.mark.parametrize(
    ("place", "errors"),
    [
        ("fxopt.api.Judge", [KeyboardInterrupt]),
        ("fxopt.judge.answered", [KeyboardInterrupt]),
        ("fxopt.api.pack", [RuntimeError, KeyboardInterrupt]),
        ("fxopt.pipeline.specialise", [RuntimeError, KeyboardInterrupt]),
        ("fxopt.compiler.lower", ERRORS),
        ("fxopt.judge.Judge.engine", [RuntimeError]),
        ("fxopt.api.make_fast", [KeyboardInterrupt]),
        ("fxopt.model.copy.deepcopy", [MemoryError]),
    ],
)
@pytest.mark.usefixtures("captured_once")
def test_a_later_stage_fails(
    stock_llama: Any, stock_state: State, monkeypatch: pytest.MonkeyPatch, place: str, errors: list[type[BaseException]]
) -> None:
    for error in errors:
        with monkeypatch.context() as patch:
            patch.setattr(place, raiser(error))
            with pytest.raises((error, FxoptError), match="injected"):
                optimise(stock_llama, passes=FEW)
        assert_untouched(stock_llama, stock_state)


@pytest.mark.usefixtures("captured_once")
def test_packing_fails_half_way(stock_llama: Any, stock_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of weights is re-seated, the other is not: the values are the same all the same."""
    from fxopt import weights

    seat, calls = weights._seat, []

    def fail_later(tensors: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("injected")
        return seat(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "are_adjacent", lambda tensors: False)
        patch.setattr(weights, "_seat", fail_later)
        with pytest.raises(MemoryError, match="injected"):
            optimise(stock_llama, passes=FEW)
    assert len(calls) == 2
    assert_untouched(stock_llama, stock_state)


def test_expert_implementation_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("eager")
    seen = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        seen.append(model.config._experts_implementation)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.export.export", fail)
    with pytest.raises(KeyboardInterrupt):
        optimise(model)
    assert seen == ["grouped_mm"]
    assert model.config._experts_implementation == "eager"


# --- a pass that raises --------------------------------------------------------------------------


METHODS = ("expected", "find", "refuse", "rewrite", "finish")


@pytest.mark.parametrize(
    ("method", "error"),
    [*((method, RuntimeError) for method in METHODS), ("find", MemoryError), ("rewrite", MemoryError)],
)
@pytest.mark.usefixtures("captured_once")
def test_an_optional_pass_fails(
    stock_llama: Any, stock_state: State, monkeypatch: pytest.MonkeyPatch, method: str, error: type[Exception]
) -> None:
    """A warning and a line in the report; everything else is done, and the tokens are right."""
    monkeypatch.setattr(FuseQKV, method, raiser(error))
    with pytest.warns(UserWarning, match=f"fuse_qkv failed with {error.__name__}: injected; fxopt goes on without"):
        fast = optimise(stock_llama, passes=FEW)
    outcome = outcome_of(fast, "fuse_qkv")
    assert outcome.matched == 0
    assert outcome.dropped is not None
    assert "injected" in outcome.dropped
    assert "fuse_qkv: dropped, fuse_qkv failed with" in str(fast.fxopt.report)
    assert outcome_of(fast, "fuse_gate_up").matched == 1
    assert generate(fast) == stock_state.tokens
    assert_untouched(stock_llama, stock_state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "error", "strict"),
    [
        (FuseQKV, KeyboardInterrupt, False),
        (FuseQKV, RuntimeError, True),
        (StaticKV, RuntimeError, False),
        (StaticKV, MemoryError, False),
        (StaticKV, KeyboardInterrupt, False),
    ],
)
@pytest.mark.usefixtures("captured_once")
def test_a_pass_fails_for_good(
    stock_llama: Any,
    stock_state: State,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Pass[Any]],
    method: str,
    error: type[BaseException],
    strict: bool,
) -> None:
    """A required pass, a strict request, an interrupt: nothing is handed out."""
    monkeypatch.setattr(kind, method, raiser(error))
    expected = KeyboardInterrupt if error is KeyboardInterrupt else RewriteError
    with pytest.raises(expected, match="injected") as raised:
        optimise(stock_llama, passes=FEW, strict=strict)
    if expected is RewriteError:
        assert f"{kind.name} failed with {error.__name__}: injected" in str(raised.value)
        assert "stock model is unchanged" in str(raised.value)
        assert isinstance(raised.value.__cause__, error)
    assert_untouched(stock_llama, stock_state)


@pytest.mark.usefixtures("captured_once")
def test_a_decode_pass_fails(stock_llama: Any, stock_state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes.matvec.Matvec.find", raiser(RuntimeError))
    with pytest.warns(UserWarning, match="matvec failed with RuntimeError: injected"):
        fast = optimise(stock_llama, passes=["matvec"])
    assert "injected" in str(outcome_of(fast, "matvec").dropped)
    assert generate(fast) == stock_state.tokens
    with pytest.raises(RewriteError, match="matvec failed"):
        optimise(stock_llama, passes=["matvec"], strict=True)
    assert_untouched(stock_llama, stock_state)
