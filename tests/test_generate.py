"""``generate`` and ``forward`` in the ways people call them."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, StoppingCriteria, TextStreamer

import fxopt
from fxopt.cache import BufferCache
from fxopt.families import VOCABULARY, tiny

MAX_LEN = 96


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def fast(stock: PreTrainedModel) -> Any:
    return fxopt.optimize(stock, max_len=MAX_LEN, backend="eager", chunk=16)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def mask(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    return mask


class Forbid(LogitsProcessor):
    """Never token 7: shows that processors see the same scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 7] = -float("inf")
        return scores


class AfterTwenty(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20, device=input_ids.device)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "scores": {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
    "processor": {"do_sample": False, "logits_processor": [Forbid()]},
    "stopping criteria": {"do_sample": False, "stopping_criteria": [AfterTwenty()]},
    "static by name": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
}


def sequences(output: Any) -> list[list[int]]:
    found: list[list[int]] = (output if isinstance(output, Tensor) else output.sequences).tolist()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_same_sequences(stock: PreTrainedModel, fast: Any, tokens: Tensor, mask: Tensor, mode: str) -> None:
    def run(model: Any) -> list[list[int]]:
        torch.manual_seed(11)
        return sequences(model.generate(tokens, attention_mask=mask, max_new_tokens=24, pad_token_id=0, **MODES[mode]))

    assert run(fast) == run(stock)


def test_eos_ends_each_row_by_itself(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    plain = stock.generate(tokens, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=VOCABULARY - 1)
    eos = int(plain[0, 14])  # what the first row says early on
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    expected = stock.generate(tokens, **options)
    assert fast.generate(tokens, **options).tolist() == expected.tolist()
    assert (expected[0, 15:] == 0).all()


def test_streamer_and_prefill_chunks(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    class Tokenizer:
        def decode(self, ids: Any, **kwargs: Any) -> str:
            return " ".join(str(int(i)) for i in torch.as_tensor(ids).flatten()) + "\n"

    class Keep(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    streamers = [Keep(Tokenizer()), Keep(Tokenizer())]
    for model, streamer in zip((stock, fast), streamers, strict=True):
        model.generate(tokens[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, streamer=streamer)
    assert streamers[0].text == streamers[1].text != ""
    chunked = fast.generate(tokens[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, prefill_chunk_size=4)
    assert chunked.tolist() == stock.generate(tokens[:1], max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()


def test_assisted_and_prompt_lookup(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    draft = tiny("llama", num_hidden_layers=1)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        common: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **options}
        assert fast.generate(tokens[:1], **common).tolist() == stock.generate(tokens[:1], **common).tolist()


def test_a_conversation_goes_on_in_the_same_cache(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    turns = {}
    for name, model in (("stock", stock), ("fast", fast)):
        first = model.generate(tokens[:1], **options)
        prompt = torch.cat([first.sequences, tokens[1:]], dim=1)
        turns[name] = model.generate(prompt, past_key_values=first.past_key_values, **options)
    assert turns["fast"].sequences.tolist() == turns["stock"].sequences.tolist()
    assert isinstance(turns["fast"].past_key_values, BufferCache)


FORWARD: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "all logits": lambda model, x: model(x).logits,
    "last logits": lambda model, x: model(x, logits_to_keep=1).logits,
    "last three": lambda model, x: model(x, logits_to_keep=3).logits,
    "by index": lambda model, x: model(x, logits_to_keep=torch.tensor([0, 4])).logits,
    "a tuple": lambda model, x: model(x, return_dict=False)[0],
    "hidden states": lambda model, x: model(x, output_hidden_states=True).hidden_states[-1],
    "no cache": lambda model, x: model(x, use_cache=False).logits,
    "embeddings": lambda model, x: model(inputs_embeds=model.get_input_embeddings()(x)).logits,
    "labels": lambda model, x: model(x, labels=x).loss[None],
    "foreign cache": lambda model, x: model(x, past_key_values=DynamicCache()).logits,
    "one token": lambda model, x: model(x[:, :1]).logits,
}


@pytest.mark.parametrize("call", FORWARD)
@torch.no_grad()
def test_forward_keeps_its_contract(stock: PreTrainedModel, fast: Any, tokens: Tensor, call: str) -> None:
    torch.testing.assert_close(FORWARD[call](fast, tokens), FORWARD[call](stock, tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_without_positions_is_left_to_the_model(
    stock: PreTrainedModel, fast: Any, tokens: Tensor, mask: Tensor
) -> None:
    found, expected = fast(tokens, attention_mask=mask).logits, stock(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert any("padded batch" in reason for reason in fast.fxopt.stats)


@torch.no_grad()
def test_crop_and_continue(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    """Rejected tokens are taken back, as assisted decoding does."""
    results = []
    for model in (stock, fast):
        cache = model(tokens[:1]).past_key_values
        cache.crop(-3)
        results.append(model(tokens[:1, -3:] + 1, past_key_values=cache).logits)
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_live_caches_never_share_and_buffers_come_back(fast: Any, tokens: Tensor) -> None:
    gc.collect()
    first = fast(tokens).past_key_values
    second = fast(tokens + 1).past_key_values
    assert first.buffers is not second.buffers
    assert not torch.equal(first.layers[0].keys, second.layers[0].keys)
    held, returned = fast.fxopt.kv_bytes, first.buffers
    del first
    gc.collect()
    third = fast(tokens).past_key_values
    assert third.buffers is returned
    assert fast.fxopt.kv_bytes == held


def test_what_a_cache_left_behind_is_not_seen(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    """A generation that filled its buffers with NaN does no harm to the next one in the same buffers."""
    cache = fast.fxopt.engine.new_cache(2)
    for buffer in cache.buffers.tensors.values():
        buffer.fill_(float("nan"))
    del buffer, cache
    gc.collect()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()


@torch.no_grad()
def test_no_mask_means_everything_as_in_the_stock_model(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    """Rows that the eager path wrote, and rows that an earlier mask hid, count when no mask is given."""
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    embeddings = stock.get_input_embeddings()(tokens)
    found = fast.generate(inputs_embeds=embeddings, **options)
    assert found.tolist() == stock.generate(inputs_embeds=embeddings, **options).tolist()
    for first in ({"output_hidden_states": True}, {"attention_mask": torch.ones_like(tokens)}):
        results = []
        for model in (stock, fast):
            cache = model(tokens, **first).past_key_values
            results.append(model(tokens[:, :3], past_key_values=cache).logits)
        torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_integers_of_any_width(stock: PreTrainedModel, fast: Any, tokens: Tensor, dtype: torch.dtype) -> None:
    positions = torch.arange(9, dtype=dtype)[None]
    found = fast(tokens.to(dtype), position_ids=positions).logits
    torch.testing.assert_close(found, stock(tokens).logits, atol=1e-4, rtol=1e-4)


def test_inference_mode_and_back(stock: PreTrainedModel, tokens: Tensor) -> None:
    with torch.inference_mode():
        fast: Any = fxopt.optimize(stock, max_len=MAX_LEN, backend="eager")
        fast.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not any(parameter.is_inference() for parameter in stock.parameters())
    gc.collect()
    fast.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)


@torch.no_grad()
def test_autocast_is_left_to_the_model(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = fast(tokens, use_cache=True).logits, stock(tokens).logits
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(stock: PreTrainedModel, fast: Any, tokens: Tensor) -> None:
    """One prompt, two continuations."""
    prefix = fast(tokens).past_key_values
    twin = copy.deepcopy(prefix)
    fast(tokens + 1, past_key_values=prefix)
    expected = stock(tokens[:, :4], past_key_values=stock(tokens).past_key_values).logits
    found = fast(tokens[:, :4], past_key_values=twin).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_interrupt_between_chunks_leaves_the_cache_as_it_was(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    expected = fast(long).logits
    cache = fast(long[:, :8]).past_key_values
    engine, calls = fast.fxopt.engine, []
    run = engine._chunk

    def interrupted(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        result: Tensor = run(*args)
        return result

    monkeypatch.setattr(engine, "_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast(long[:, 8:], past_key_values=cache)
    monkeypatch.undo()
    assert cache.length == 8
    again = fast(long[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected[:, 8:], atol=1e-5, rtol=1e-5)


def test_two_threads(stock: PreTrainedModel, fast: Any) -> None:
    prompts = [torch.randint(3, VOCABULARY, (1, 4 + i), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    expected = [stock.generate(prompt, **options).tolist() for prompt in prompts]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda prompt: fast.generate(prompt, **options).tolist(), prompts))
    assert found == expected


def test_models_keep_signatures_of_their_own(fast: Any) -> None:
    before = str(inspect.signature(fast.forward))
    fxopt.optimize(tiny("bloom"), max_len=32, backend="eager", verify="off")
    assert str(inspect.signature(fast.forward)) == before
