"""What a graph is judged by: the truth in a wider dtype, the scenarios, and the numbers compared."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fxopt.distance import (
    FACTOR,
    FLOOR,
    PLAUSIBLE,
    WITHOUT_TRUTH,
    Rounding,
    difference,
    relative_error,
    token_difference,
)
from fxopt.families import FAMILIES, tiny
from fxopt.scenarios import PROMPT, answered
from fxopt.wide import WIDER, wide

TOKENS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TOKENS, past_key_values=DynamicCache(), use_cache=True).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_is_a_wider_copy(family: str) -> None:
    """The bfloat16 model under ``wide`` is, to the bit, its own float32 copy, and its weights stay as they are."""
    model = tiny(family, torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with wide(torch.float32):
        found = logits(model)
    assert found.dtype is torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert torch.equal(found, logits(model.to(torch.float32)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_the_truth_about_float32_is_nearer_than_float32(family: str) -> None:
    """Mixtures have no float64 kernel for their experts; the rest of them is computed in float64 all the same."""
    model = tiny(family)
    with wide(torch.float64):
        truth = logits(model)
    assert truth.dtype is torch.float64
    assert 0 < relative_error(logits(model), truth) < 20 * torch.finfo(torch.float32).eps


def test_scenarios_reach_every_border() -> None:
    """Padding, a chunk, the first window of the cache, the sliding window, the last row."""
    model = tiny("mistral", sliding_window=100)
    cases = list(answered(model, batch=2, far_batch=1, max_len=200))
    assert [case.scenario.name for case in cases] == [
        "a padded prompt",
        "past the sliding window of 100",
        "up to token 200",
    ]
    prompt, sliding, end = (case.scenario for case in cases)
    assert prompt.feeds[0] == (0, PROMPT)
    assert (prompt.mask == 0).any(dim=1).tolist() == [False, True]
    assert prompt.rows > 64 > PROMPT
    assert sliding.mask[0, 0] == 0  # the padded one of the two
    padding = int((sliding.mask == 0).sum())
    assert sliding.start - padding < 100 < sliding.start - padding + 4
    assert end.rows == 200
    assert end.feeds[-1][1] - end.feeds[-1][0] > 1
    for case in cases:
        assert case.truth is not None
        assert case.truth.keys[0].shape == case.stock.keys[0].shape
        assert case.stock.keys[0].shape[2] == case.scenario.tokens.shape[1]


def test_far_scenarios_say_what_a_whole_prompt_would() -> None:
    """Going on from a cache that was filled by hand is what feeding those tokens would lead to."""
    model = tiny("llama")
    case = list(answered(model, batch=2, far_batch=1, max_len=120))[-1]
    cache = DynamicCache()
    for layer in range(2):
        key, value = case.scenario.past.of(layer)
        assert key.shape[2] == case.scenario.start
        cache.update(key, value, layer)
    with torch.no_grad():
        for start, end in case.scenario.feeds:
            found = model(
                input_ids=case.scenario.tokens[:, start:end],
                attention_mask=case.scenario.mask[:, : case.scenario.start + end],
                position_ids=case.scenario.positions[:, start:end],
                past_key_values=cache,
            ).logits
    torch.testing.assert_close(found[:, -1], case.stock.logits[-1])


@pytest.mark.parametrize("max_len", [2, 3, 5, 20, 63, 64, 65, 66, 70, 76])
def test_short_limits_are_never_passed(max_len: int) -> None:
    for case in answered(tiny("llama", num_hidden_layers=1), batch=2, far_batch=2, max_len=max_len):
        assert case.scenario.rows <= max_len
        assert all(end > start for start, end in case.scenario.feeds)


ROWS = torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def off_by(rows: torch.Tensor, roundings: float, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    """The rows with noise of so many roundings of their length."""
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = roundings * torch.finfo(dtype).eps * rows.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    noisy: torch.Tensor = rows + noise * scale
    return noisy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_how_far_off_is_too_far(dtype: torch.dtype) -> None:
    """FACTOR times the stock model's own distance, or FLOOR roundings; then it is too much."""
    wider = WIDER[dtype]
    truth = ROWS.to(wider)
    eps = torch.finfo(dtype).eps

    def share(ours: float, own: float) -> float:
        # Rows are kept wide, so that storing them adds no rounding of its own; the dtype is the stock model's.
        stock = off_by(ROWS, own, dtype).to(dtype)
        distance = relative_error(stock, truth) / eps
        noisy = off_by(ROWS, ours * distance, dtype, seed=3).to(wider)
        found = difference("", distance * eps, Rounding(dtype), noisy, stock, truth)
        assert found.allowed == pytest.approx(max(FACTOR * distance, FLOOR) * eps, rel=1e-3)
        return found.share

    assert share(ours=0.9 * FACTOR, own=4) < 1
    assert share(ours=1.1 * FACTOR, own=4) > 1


def test_without_a_truth_the_stock_model_is_it() -> None:
    """Float64 has nothing wider; a model whose choices rounding turns over is no measure of distance."""
    stock = ROWS.clone()
    assert (
        difference("", 0.0, Rounding(torch.float64, False), off_by(ROWS, 1, torch.float64), stock, stock).allowed
        == WITHOUT_TRUTH[torch.float64]
    )
    far = off_by(ROWS, 64, torch.bfloat16).to(torch.bfloat16)
    found = difference("", relative_error(far, ROWS), Rounding(torch.bfloat16), far.clone(), far, ROWS.float())
    assert found.error == 0.0
    assert found.allowed == PLAUSIBLE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_runs_in_no_other_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with as it is, and said so; what is right still passes."""
    import fxopt

    def refuse(*args: Any) -> Any:
        raise RuntimeError("this kernel knows one dtype")

    monkeypatch.setattr("fxopt.scenarios.wide", refuse)
    fast = fxopt.optimize(tiny("llama", dtype), 100, backend="eager", verify="each", strict=True)
    checks = [stage.verified for stage in fast.fxopt.report.stages if stage.verified]
    assert checks
    assert {c.allowed for c in checks if not c.where.startswith("greedy")} <= {WITHOUT_TRUTH[dtype]}


def test_a_model_that_widens_its_logits() -> None:
    """Float32 logits of a bfloat16 model carry the noise of bfloat16."""
    import fxopt

    model: Any = tiny("llama", torch.bfloat16)
    forward = type(model).forward

    class Widening(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = output.logits.float()
            return output

    Widening.forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.__class__ = Widening
    fast = fxopt.optimize(model, 100, backend="eager", verify="each")
    assert not [stage.name for stage in fast.fxopt.report.passes if stage.dropped]


@pytest.mark.parametrize("max_len", [2, 3, 5, 20])
def test_a_pass_that_is_wrong_for_several_tokens_only(max_len: int) -> None:
    """However short the limit is, more than one token is fed at once wherever two fit."""
    cases = answered(tiny("llama", num_hidden_layers=1), batch=1, far_batch=1, max_len=max_len)
    lengths = [end - start for case in cases for start, end in case.scenario.feeds]
    assert max(lengths) > 1 or max_len == 2
    assert 1 in lengths


def test_one_sequence_is_padded_too() -> None:
    case = next(answered(tiny("llama", num_hidden_layers=1), batch=1, far_batch=1, max_len=100))
    assert 0 < int((case.scenario.mask == 0).sum()) < PROMPT


def test_numbers_that_are_none() -> None:
    """NaN where the stock model has a number is as wrong as can be; where it has NaN too, it is right."""
    broken = ROWS.clone()
    broken[0, 0] = float("nan")
    assert relative_error(broken, ROWS) == float("inf")
    assert relative_error(broken, broken) == 0.0
    assert relative_error(ROWS[:0], ROWS[:0]) == 0.0


def test_one_wrong_row_is_not_averaged_away() -> None:
    wrong = torch.cat([ROWS] * 100)
    wanted = wrong.clone()
    wrong[17] *= 1.5
    assert relative_error(wrong, wanted) > 0.1


def test_a_token_may_differ_only_where_it_hardly_matters() -> None:
    truth = torch.randn(1, 1000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    truth[0, 3] = 5.0

    def share(second_best: float) -> float:
        """Ours prefers 4, the stock model 3; how sure was the truth?"""
        truth[0, 4] = second_best
        ours = truth.float()
        ours[0, 4] = 5.1
        return token_difference("", 1e-6, Rounding(torch.float32), ours, truth.float(), truth).share

    assert share(5.0 - 1e-6) < 1
    assert share(4.9) > 1
