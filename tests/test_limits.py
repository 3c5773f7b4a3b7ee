"""Calls that an optimised model cannot serve: a sentence with the numbers in it, and it goes on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentences import assert_sentence
from torch import nn

import fxopt
from fxopt.errors import InvalidRequestError
from fxopt.families import tiny

MAX_LEN = 24


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def fast(llama: Any) -> Any:
    return fxopt.optimize(llama, MAX_LEN, backend="eager", max_batch=2, chunk=8)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.full((batch, length), 5)


@pytest.mark.usefixtures("no_work")
def test_an_optimised_model_is_not_optimised_again(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fxopt.optimize(fast, 32)
    assert_sentence(raised.value, "LlamaForCausalLM is optimised already", "stock model")


def test_a_prompt_and_answer_beyond_max_len(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(1, 10), max_new_tokens=MAX_LEN - 10 + 1, do_sample=False)
    assert_sentence(raised.value, "prompt of 10 tokens", "15 new", "make 25", "max_len is 24")
    assert fast.generate(tokens(1, 10), max_new_tokens=MAX_LEN - 10, do_sample=False).shape[1] <= MAX_LEN


def test_a_prompt_alone_beyond_max_len(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(1, 40), max_new_tokens=5, do_sample=False)
    assert_sentence(raised.value, "prompt of 40 tokens", "5 new", "make 45", "max_len is 24")


@pytest.mark.parametrize(
    ("batch", "options"), [(3, {}), (1, {"num_beams": 3}), (2, {"num_return_sequences": 2, "do_sample": True})]
)
def test_a_batch_beyond_max_batch(fast: Any, batch: int, options: dict[str, Any]) -> None:
    """Beams and several answers count: each has rows of its own in the cache."""
    copies = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(batch, 4), **{"max_new_tokens": 4, "do_sample": False, **options})
    assert_sentence(raised.value, f"a batch of {batch * copies} sequences", "max_batch is 2")


def test_a_batch_beyond_max_batch_in_forward(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(3, 4))
    assert_sentence(raised.value, "a batch of 3 sequences", "max_batch is 2")


def test_a_cache_that_is_full(llama: Any, fast: Any) -> None:
    """The call that does not fit says both numbers and leaves the cache usable."""
    held = fast(tokens(1, 20)).past_key_values
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(1, 5), past_key_values=held)
    assert_sentence(raised.value, "the cache holds 20 tokens", "5 more", "max_len is 24")
    logits = fast(tokens(1, 4), past_key_values=held).logits
    torch.testing.assert_close(logits, llama(tokens(1, 24)).logits[:, -4:], atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidRequestError, match=r"holds 24 tokens and 1 more .* max_len is 24"):
        fast(tokens(1, 1), past_key_values=held)


def test_a_cache_that_is_full_on_the_eager_path(fast: Any) -> None:
    """Calls that the graphs do not serve fill the same buffers, and stop at the same row."""
    held = fast(tokens(1, 20)).past_key_values
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(1, 5), past_key_values=held, output_attentions=True)
    assert_sentence(raised.value, "the cache holds 20 of 24 tokens", "5 more")


def test_inputs_on_another_device(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(1, 4).to("meta"))
    assert_sentence(raised.value, "input_ids is on meta", "the model is on cpu")


def test_weights_that_have_moved() -> None:
    """Refused at the next prefill, by name; the stock model goes on, and can be optimised anew."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    fast: Any = fxopt.optimize(stock, MAX_LEN, backend="eager", passes="minimal", verify="off")
    fast.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    stock.to(torch.float64)
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    assert_sentence(raised.value, "weight has moved since fxopt.optimize", "model.to(...)", "again")
    with pytest.raises(InvalidRequestError, match="has moved"):
        fast(tokens(1, 4))
    expected = stock.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    again: Any = fxopt.optimize(stock, MAX_LEN, backend="eager", passes="minimal", verify="off")
    assert torch.equal(again.generate(tokens(1, 4), max_new_tokens=4, do_sample=False), expected)


def test_weights_updated_in_place_are_seen() -> None:
    """Packed weights too: nothing has moved."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    fast: Any = fxopt.optimize(stock, MAX_LEN, backend="eager", verify="off")
    with torch.no_grad():
        stock.model.layers[0].self_attn.k_proj.weight.mul_(-0.5)
        stock.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    torch.testing.assert_close(fast(tokens(1, 6)).logits, stock(tokens(1, 6)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["data", "parameter"])
@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.down_proj"])
def test_one_weight_that_was_replaced(module: str, how: str) -> None:
    """Packed or not: the old numbers must not be used silently."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    fast: Any = fxopt.optimize(stock, 32, backend="eager", verify="off")
    linear = stock.model.layers[0].get_submodule(module)
    if how == "data":
        linear.weight.data = torch.zeros_like(linear.weight)
    else:
        linear.weight = nn.Parameter(torch.zeros_like(linear.weight))
    with pytest.raises(fxopt.InvalidRequestError, match="moved"):
        fast(torch.tensor([[5, 6, 7]]))
