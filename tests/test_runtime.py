"""Buffers, recorded steps, interruptions and the loop: what the runtime promises beside the right tokens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fxopt
from fxopt import cache as caches
from fxopt.errors import CacheMemoryError, InvalidRequestError
from fxopt.families import VOCABULARY, tiny
from fxopt.program import Facts, KVShape
from fxopt.replay import Replays

MAX_LEN = 160
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return tiny("llama")


def fast_of(stock: PreTrainedModel, **options: Any) -> Any:
    return fxopt.optimize(stock, MAX_LEN, **{"backend": "eager", "verify": "off", "chunk": 16, **options})


@pytest.fixture(scope="module")
def fast(stock: PreTrainedModel) -> Any:
    return fast_of(stock)


def prompt(batch: int = 1, length: int = 9, seed: int = 3) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_batches_share_sets_of_the_next_power_of_two(stock: PreTrainedModel) -> None:
    fast = fast_of(stock, max_batch=6)
    pool = fast.fxopt.engine.pool
    assert [pool.size_for(batch) for batch in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    for batch in (3, 4, 3):
        fast.generate(**prompt(batch), max_new_tokens=3, **GREEDY)
    assert pool.nbytes == caches.buffer_bytes(fast.fxopt.engine.facts, 4)  # one set served all three
    assert fast.fxopt.release() == pool_bytes(fast, 4)
    assert fast.fxopt.kv_bytes == 0
    assert fast.generate(**prompt(2), max_new_tokens=3, **GREEDY).shape == (2, 12)


def pool_bytes(fast: Any, size: int) -> int:
    return caches.buffer_bytes(fast.fxopt.engine.facts, size)


def test_the_bytes_that_are_counted_are_those_allocated(fast: Any) -> None:
    buffers = caches.BufferSet(fast.fxopt.engine.facts, 3)
    assert buffers.nbytes == sum(tensor.nbytes for tensor in (*buffers.tensors.values(), buffers.mask))


def test_more_caches_than_allowed(stock: PreTrainedModel) -> None:
    """Caches that are held are never shared: one more is refused, and all go on working."""
    fast = fast_of(stock, max_cache_bytes=int(2.5 * pool_bytes(fast_of(stock), 1)))
    options = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True}
    held = [fast.generate(**prompt(seed=seed), **options) for seed in (1, 2)]
    with pytest.raises(CacheMemoryError, match=r"takes [\d,]+ bytes.*still held.*max_cache_bytes=.*del outputs"):
        fast.generate(**prompt(seed=3), **options)
    assert held[0].past_key_values.length == held[1].past_key_values.length == 11
    del held[0]
    gc.collect()
    assert fast.generate(**prompt(seed=3), **options).sequences.shape == (1, 12)


def test_idle_sets_of_another_size_make_room(stock: PreTrainedModel) -> None:
    fast = fast_of(stock, max_cache_bytes=pool_bytes(fast_of(stock), 4))
    fast.generate(**prompt(4), max_new_tokens=2, **GREEDY)
    assert fast.generate(**prompt(2), max_new_tokens=2, **GREEDY).shape == (2, 11)


def test_out_of_memory_names_the_bytes(stock: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_of(stock)
    zeros: Callable[..., Tensor] = torch.zeros

    def scarce(*sizes: Any, **like: Any) -> Tensor:
        if isinstance(sizes[0], tuple) and sizes[0][0] > 2:
            raise torch.OutOfMemoryError("DefaultAllocator: not enough memory")
        return zeros(*sizes, **like)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", scarce)
        with pytest.raises(CacheMemoryError, match=f"takes {pool_bytes(fast, 4):,} bytes.*not enough memory"):
            fast.generate(**prompt(3), max_new_tokens=2, **GREEDY)
        assert fast.generate(**prompt(2), max_new_tokens=2, **GREEDY).shape == (2, 11)
    assert fast.generate(**prompt(3), max_new_tokens=2, **GREEDY).shape == (3, 11)


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_interrupted_anywhere_and_used_again(stock: PreTrainedModel, calls: int) -> None:
    fast = fast_of(stock)
    options = {**GREEDY, "max_new_tokens": 8}
    expected = stock.generate(**prompt(length=40), **options)
    engine = fast.fxopt.engine
    fast.generate(**prompt(length=40), **options)
    lowered = engine.lowered(engine.decode_role(1) if calls > 1 else engine.prefill_role(1))
    run, seen = lowered.call, []

    def interrupted(*tensors: Tensor) -> Any:
        seen.append(1)
        if len(seen) == min(calls, 5):
            raise KeyboardInterrupt
        return run(*tensors)

    lowered.call = interrupted
    with pytest.raises(KeyboardInterrupt):
        fast.generate(**prompt(length=40), **options)
    lowered.call = run
    assert fast.generate(**prompt(length=40), **options).tolist() == expected.tolist()


def test_a_recorded_step_is_kept_by_batch_and_window(stock: PreTrainedModel) -> None:
    """With a recorder that notes what it is given: the addresses are the same whenever the recording is replayed."""
    fast = fast_of(stock)
    engine = fast.fxopt.engine
    recorded: list[int] = []

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        step()  # a warm-up writes the row that the replay writes again
        recorded.append(1)
        result = torch.empty_like(step())
        return lambda: result.copy_(step())

    engine.replays = Replays(engine.facts.device, record)
    options = {**GREEDY, "max_new_tokens": 80}
    for batch in (1, 2, 1, 2, 1):
        output = fast.generate(**prompt(batch), **options, return_dict_in_generate=True, output_logits=True)
        expected = stock.generate(**prompt(batch), **options, return_dict_in_generate=True, output_logits=True)
        assert output.sequences.tolist() == expected.sequences.tolist()
        for one, other in zip(output.logits, expected.logits, strict=True):  # each its own, not the last one's
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        del output
    assert len(recorded) == 4  # windows of 64 and 128 rows, for one sequence and for two


def test_a_step_that_cannot_be_recorded_runs_as_it_is(fast: Any, caplog: pytest.LogCaptureFixture) -> None:
    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    replays = Replays(torch.device("cpu"), record)
    assert replays.of("key", {}, lambda: lambda: torch.ones(1))().item() == 1
    assert "runs launch by launch: operation not permitted" in caplog.text


LOOPS: dict[str, tuple[dict[str, Any], str]] = {
    "greedy": ({}, "loop: fast"),
    "sampling": ({"do_sample": True, "top_k": 9, "temperature": 0.8}, "loop: fast"),
    "penalty": ({"repetition_penalty": 1.3}, "loop: fast"),
    "time": ({"max_time": 60.0}, "loop: Transformers' own, because MaxTimeCriteria is to stop it"),
    "scores": (
        {"output_scores": True, "return_dict_in_generate": True},
        "loop: Transformers' own, because output_scores was asked for",
    ),
}


@pytest.mark.parametrize("kind", LOOPS)
def test_which_loop_ran_and_why(stock: PreTrainedModel, fast: Any, kind: str) -> None:
    options, said = LOOPS[kind]
    before = fast.fxopt.stats.copy()
    outputs = []
    for model in (stock, fast):
        torch.manual_seed(11)
        output = model.generate(**prompt(2), **{**GREEDY, "max_new_tokens": 70, **options})
        outputs.append(getattr(output, "sequences", output).tolist())
    assert outputs[0] == outputs[1]
    assert {k: v for k, v in (fast.fxopt.stats - before).items() if k.startswith("loop")} == {said: 1}


def test_a_device_that_is_asked_now_and_then(
    stock: PreTrainedModel, fast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded past the end of the last sequence, and taken back: tokens and cache are as if never decoded."""
    greedy = {**GREEDY, "max_new_tokens": 40, "return_dict_in_generate": True}
    tokens = stock.generate(**prompt(2), **greedy).sequences
    eos = {"eos_token_id": [int(tokens[0, 12]), int(tokens[1, 19])]}
    expected = stock.generate(**prompt(2), **{**greedy, **eos})
    assert expected.sequences.shape[1] < 49
    monkeypatch.setattr("fxopt.decode_loop._asking_is_free", lambda *_: False)
    found = fast.generate(**prompt(2), **{**greedy, **eos})
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.past_key_values.length == expected.past_key_values.get_seq_length()


def test_sequences_repeated_and_selected(stock: PreTrainedModel, fast: Any) -> None:
    """What search written by users does with a cache."""
    caches_of = []
    for model in (stock, fast):
        output = model(**prompt(2), use_cache=True)
        cache = output.past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        mask = torch.ones(3, 10, dtype=torch.long)
        caches_of.append(model(input_ids=torch.tensor([[5], [6], [7]]), attention_mask=mask, past_key_values=cache))
    torch.testing.assert_close(caches_of[0].logits, caches_of[1].logits, rtol=1e-4, atol=1e-4)


def test_a_prompt_in_front_of_a_draft_is_not_scored(stock: PreTrainedModel, fast: Any) -> None:
    before = fast.fxopt.stats.copy()
    found = fast(**prompt(1, 40), logits_to_keep=5).logits
    torch.testing.assert_close(found, stock(**prompt(1, 40), logits_to_keep=5).logits, rtol=1e-4, atol=1e-4)
    counted = fast.fxopt.stats - before
    assert counted["prefill"] == 3  # 35 tokens in chunks of 16
    assert counted["verify"] + counted["score"] == 1


def test_a_full_cache_is_a_sentence(fast: Any) -> None:
    cache = fast.fxopt.engine.new_cache(1)
    tokens = torch.ones(1, MAX_LEN, dtype=torch.long)
    fast(input_ids=tokens, past_key_values=cache)
    with pytest.raises(InvalidRequestError, match=f"max_len is {MAX_LEN}"):
        fast(input_ids=tokens[:, :1], past_key_values=cache)
    assert cache.length == MAX_LEN


def test_the_report_names_the_graphs_by_batch() -> None:
    alone, some = (fxopt.optimize(tiny("llama"), MAX_LEN, max_batch=limit, backend="eager") for limit in (1, None))
    assert alone.fxopt.report.graphs == {"1 sequence": "prefill, decode"}
    assert some.fxopt.report.graphs["two sequences or more"] == "compiled on first use"
    both = fxopt.optimize(tiny("llama"), MAX_LEN, max_batch=4, backend="eager").fxopt.report
    assert both.graphs == dict.fromkeys(("1 sequence", "two sequences or more"), "prefill, decode")
    assert "for two sequences or more prefill, decode" in str(both)


def test_the_collector_may_run_while_a_buffer_is_borrowed() -> None:
    """In a thread, so that the dead lock is a failure and not a hang."""
    facts = Facts((KVShape(2, 16, 2, 16),), 64, 32, torch.float32, torch.device("cpu"), 0, 0, 0, tuple)
    pool = caches.BufferPool(facts)

    class Collecting(caches.BufferSet):
        def __init__(self, *args: Any) -> None:
            gc.collect()  # as may happen at any allocation
            super().__init__(*args)

    def borrow() -> None:
        held: Any = caches.BufferCache(pool, facts, 1)
        held.itself = held  # part of a cycle, as an exception's traceback makes it
        del held
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caches, "BufferSet", Collecting)
            pool.borrow(2)

    thread = threading.Thread(target=borrow, daemon=True)
    thread.start()
    thread.join(120)  # collecting all that other tests have left takes a while
    assert not thread.is_alive()
