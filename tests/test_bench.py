"""The arithmetic of ``fxopt bench``: sizes, and what becomes of seconds and tokens."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
import torch
from bench_fakes import Fake

from fxopt.bench.answers import agreed, hashed
from fxopt.bench.bandwidth import read_speed
from fxopt.bench.figures import figures
from fxopt.bench.growth import NAMES, axes
from fxopt.bench.row import Row
from fxopt.bench.setting import Setting, settings
from fxopt.bench.timing import Run, _on_gpu, timed
from fxopt.bench.traffic import CacheRow, Traffic, weight_bytes
from fxopt.errors import InvalidRequestError
from fxopt.families import SLIDING, tiny

SETTING = Setting(batch=2, prompt=20, new=4, max_len=24)
SAID = [[5, 6, 7, 8], [5, 6, 7, 9]]


def ran(prefill: float, *steps: float, tokens: list[list[int]] = SAID) -> Run:
    return Run(prefill, steps, prefill + sum(steps), tokens)


def row(*runs: Run, contender: str = "fxopt", tokens: list[list[int]] | None = None, **others: Any) -> Row:
    return Row(contender, SETTING, tokens=tokens or SAID, runs=list(runs), **others)


# --- sizes ---------------------------------------------------------------------------------------


def test_settings_are_all_combinations() -> None:
    found = settings([1, 4], [100, 200], [8])
    assert [(one.batch, one.prompt, one.new) for one in found] == [(1, 100, 8), (1, 200, 8), (4, 100, 8), (4, 200, 8)]
    assert {one.max_len for one in found} == {208}, "one cache for all of them"
    assert {one.max_len for one in settings([1], [100], [8], 512)} == {512}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [(([1], [100], [8], 107), "make 108, but max_len is 107"), (([1], [100], [1]), "ask for 2 or more")],
)
def test_settings_that_cannot_be(sizes: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        settings(*sizes)


def test_axes_stay_within_the_positions() -> None:
    for limit, longest in ((4096, 4096), (100_000, 8192), (None, 8192)):
        found = axes(limit)
        assert tuple(axis.name for axis in found) == NAMES
        wanted = [one for axis in found for one in axis.settings]
        assert max(one.max_len for one in wanted) == longest
        assert all(one.prompt + one.new <= one.max_len for one in wanted)


@pytest.mark.parametrize("axis", axes(4096), ids=lambda axis: axis.name)
def test_one_size_grows_along_an_axis(axis: Any) -> None:
    sizes = [getattr(one, axis.size) for one in axis.settings]
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 2
    assert len({dataclasses.replace(one, **{axis.size: 1}) for one in axis.settings}) == 1


# --- timing --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Working(Fake):
    """Takes 3 seconds for the prompt, 1, 2, 3 … for the tokens after it, and half a second to finish."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("working", [])
        self._clock = clock

    def generate(self, prompt: torch.Tensor, new: int, stamp: Any) -> list[list[int]]:
        for step in range(new):
            self._clock.now += step or 3
            if stamp is not None:
                stamp()
        self._clock.now += 0.5
        return [[7] * new] * prompt.shape[0]


def test_a_run_is_split_at_its_tokens() -> None:
    clock = Clock()
    run = timed(Working(clock), torch.ones(2, 5, dtype=torch.long), 4, clock)
    assert run == Run(prefill=3.0, steps=(1.0, 2.0, 3.0), total=9.5, tokens=[[7] * 4] * 2)


def test_on_a_gpu_nobody_looks_at_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token and all of them, each waited for: the difference is what decoding took."""
    clock = Clock()
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    run = _on_gpu(Working(clock), torch.ones(1, 5, dtype=torch.long), 4, clock)
    assert run == Run(prefill=3.5, steps=(2.0,), total=9.5, tokens=[[7] * 4])
    assert len(waited) == 4


def test_an_answer_of_another_length_is_no_answer() -> None:
    class Short(Fake):
        def generate(self, prompt: torch.Tensor, new: int, stamp: Any) -> list[list[int]]:
            return super().generate(prompt, new - 1, stamp)

    with pytest.raises(RuntimeError, match=r"2 sequences of 4 new tokens were asked for, and \[3, 3\] came"):
        timed(Short("short", []), torch.ones(2, 5, dtype=torch.long), 4)


# --- figures -------------------------------------------------------------------------------------


def test_figures_of_a_row() -> None:
    runs = (ran(0.3, 0.1, 0.1, 0.5), ran(0.2, 0.2, 0.2, 0.2), ran(0.4, 0.3, 0.1, 0.2))
    own = row(*runs, step_bytes=4e9, peak_bytes=5 * 10**8)
    found = figures(own, None, None, None)
    assert found.prefill_ms == pytest.approx(300)
    assert found.token_ms == pytest.approx(200), "the median of all steps, not the mean"
    assert found.decode_tok_s == pytest.approx(2 / 0.2)
    assert found.tok_s == pytest.approx(2 * 4 / 1.0), "new tokens of all sequences over the median total"
    assert found.read_gb_s == pytest.approx(20)
    assert found.of_read_speed is None, "nobody read memory beside it"
    assert found.peak_mb == 500
    assert (found.rounds, found.trouble, found.agreed, found.to_stock) == (3, None, None, None)


def test_ratios_are_taken_in_each_round() -> None:
    """The machine is three times slower in the second round and the third; what ran beside it felt the same."""
    stock = row(ran(1, 2, 2, 2), ran(3, 6, 6, 6), ran(3, 9, 9, 9), contender="stock eager")
    before = row(ran(1, 1, 1, 1), ran(3, 3, 3, 3), ran(3, 3, 3, 3), contender="before")
    own = row(ran(1, 1, 0.5, 0.5), ran(3, 3, 1.5, 1.5), ran(3, 3, 1.5, 1.5))
    found = figures(own, stock, before, None)
    assert found.decode_to_stock == pytest.approx(4.0)
    assert found.decode_to_before == pytest.approx(2.0)
    assert found.to_stock == pytest.approx(7 / 3)
    assert found.to_before == pytest.approx(4 / 3)
    assert found.step_to_first is None


def test_growth_is_taken_in_each_round() -> None:
    """The machine becomes slower and slower: the medians of all steps would say 3.0 and not 1.5."""
    first = row(ran(1, 2, 2, 2), ran(1, 2, 2, 2), ran(9, 20, 20, 20), ready_s=4.0)
    own = row(ran(1, 3, 3, 3), ran(1, 6, 6, 6), ran(9, 30, 30, 30), ready_s=6.0)
    found = figures(own, None, None, first)
    assert found.step_to_first == pytest.approx(1.5)
    assert found.ready_to_first == pytest.approx(1.5)
    assert figures(first, None, None, first).step_to_first == pytest.approx(1.0)
    failed = figures(own, None, None, row(trouble="out of memory"))
    assert (failed.step_to_first, failed.ready_to_first) == (None, None)


def test_the_limit_is_that_of_the_round() -> None:
    """Memory is quick in the first round alone; the best read of all rounds would make it 0.2."""
    steps, speeds = (0.1, 0.5, 0.5, 0.5), (8e10, 2e10, 1e10, None)
    runs = [dataclasses.replace(ran(1, step), read_speed=speed) for step, speed in zip(steps, speeds, strict=True)]
    found = figures(row(*runs, step_bytes=4e9), None, None, None)
    assert found.of_read_speed == pytest.approx(0.5), "of 0.5, 0.4 and 0.8"


def test_a_round_that_was_not_finished_is_not_compared() -> None:
    stock = row(ran(1, 1, 1, 1), ran(1, 1, 1, 1), contender="stock eager")
    assert figures(row(ran(1, 0.5, 0.5, 0.5)), stock, None, None).decode_to_stock == pytest.approx(2.0)


def test_a_row_without_runs() -> None:
    stock = row(ran(1, 1, 1, 1), contender="stock eager")
    found = figures(row(trouble="out of memory"), stock, stock, stock)
    assert (found.token_ms, found.tok_s, found.to_stock, found.trouble) == (None, None, None, "out of memory")
    assert not found.has_failed
    assert figures(row(), stock, None, None).trouble == "not measured"
    assert figures(row(trouble="it broke"), stock, None, None).has_failed


def test_tokens_that_change_from_run_to_run() -> None:
    found = figures(row(ran(1, 1), ran(1, 1, tokens=[[5, 6, 7, 8], [1, 1, 1, 1]])), None, None, None)
    assert found.trouble == "its tokens changed from run to run"
    assert found.has_failed


@pytest.mark.parametrize(
    ("tokens", "agreeing", "same"),
    [(SAID, 4, True), ([[5, 6, 7, 8], [5, 6, 1, 9]], 2, False), ([[1, 6, 7, 8], [5, 6, 7, 9]], 0, False)],
)
def test_tokens_are_compared_with_stock(tokens: list[list[int]], agreeing: int, same: bool) -> None:
    found = figures(row(ran(1, 1, tokens=tokens), tokens=tokens), row(contender="stock eager"), None, None)
    assert (found.agreed, found.is_same) == (agreeing, same)
    assert agreed(tokens, SAID) == agreeing


def test_the_hash() -> None:
    """Eight digits of the sha256 of the list of texts as Python writes it."""
    texts = ["Once upon a time", "it's"]
    assert hashed(texts) == hashlib.sha256(b"""['Once upon a time', "it's"]""").hexdigest()[:8]
    assert len({hashed(one) for one in (texts, texts[::-1], ["Once upon a time it's"], texts[:1])}) == 4


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_step(tied: bool) -> None:
    model: Any = tiny("llama", tie_word_embeddings=tied)
    config = model.config
    own = sum(one.nbytes for name, one in model.named_parameters() if "embed_tokens" not in name)
    table = 4 * config.vocab_size * config.hidden_size
    traffic = Traffic.of(model)
    assert traffic.weight_bytes == own + (table if tied else 0), "a table that is looked up is not read"
    assert weight_bytes(model) == own + table + sum(one.nbytes for one in model.buffers())
    row_bytes = 2 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 4
    assert traffic.rows == (CacheRow(row_bytes, None),) * 2
    assert traffic.step(3, 10.5) == traffic.weight_bytes + 3 * 2 * 10.5 * row_bytes


def test_a_sliding_window_bounds_what_is_read() -> None:
    traffic = Traffic.of(tiny("mistral"))
    assert {one.window for one in traffic.rows} == {SLIDING}
    assert traffic.step(1, 10 * SLIDING) == traffic.step(1, SLIDING) > traffic.step(1, SLIDING - 1)


def test_weights_that_share_memory_count_once() -> None:
    model: Any = tiny("llama")
    before = weight_bytes(model)
    model.fused = torch.nn.Parameter(model.lm_head.weight.detach())
    assert weight_bytes(model) == before


def test_reading_memory_takes_time() -> None:
    """More than a disk and less than any memory."""
    assert 1e8 < (read_speed(torch.device("cpu"), 2**24) or 0) < 1e13
    assert read_speed(torch.device("cpu"), 2**60) is None, "there is no room for as much"
