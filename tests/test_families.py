"""Every promised architecture: the stock model's tokens, logits and no surprises at the borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt.families import FAMILIES, SLIDING, VOCABULARY, tiny

CHUNK = 16
NEW = 40
LONGEST = 37  # two chunks and a rest; with 40 new tokens far past the sliding window
MAX_LEN = LONGEST + NEW
LOGIT_TOLERANCE = 1e-4

assert MAX_LEN > SLIDING + CHUNK

#: Families whose compiled form is tested too, one for each way of writing attention, MLP and positions.
COMPILED = ("llama", "gemma2", "gpt2", "gptj", "bloom", "mixtral", "gpt_neo")


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: Any, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits of every step."""
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens) if mask is None else mask,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


def assert_same(stock: Any, fast: Any, tokens: Tensor, mask: Tensor | None = None) -> None:
    expected, logits = generate(stock, tokens, mask)
    found, fast_logits = generate(fast, tokens, mask)
    assert found.tolist() == expected.tolist()
    torch.testing.assert_close(fast_logits, logits, atol=LOGIT_TOLERANCE, rtol=LOGIT_TOLERANCE)


def left_padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    tokens, mask = prompt(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : row * length // batch] = 0
    return tokens.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_and_logits(family: str) -> None:
    """Shorter than a chunk, a chunk, longer; to exactly max_len; left-padded; nothing fell back to eager."""
    stock = tiny(family)
    fast = fxopt.optimize(stock, max_len=MAX_LEN, backend="eager", chunk=CHUNK, strict=True, verify="each")
    for length in (1, 5, CHUNK, CHUNK + 1, LONGEST):
        assert_same(stock, fast, prompt(1, length))
    assert_same(stock, fast, *left_padded(3, 20))
    eager = {reason: count for reason, count in fast.fxopt.stats.items() if reason.startswith("eager")}
    assert not eager
    for outcome in fast.fxopt.report.passes:
        assert outcome.expected is None or outcome.matched == outcome.expected, outcome


@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.slow
def test_same_tokens_compiled(family: str) -> None:
    """The same through Inductor, with the passes that only it gets, and nothing copies a cache."""
    stock = tiny(family)
    fast = fxopt.optimize(stock, max_len=MAX_LEN, chunk=CHUNK, strict=True)
    for length in (5, CHUNK, LONGEST):
        assert_same(stock, fast, prompt(1, length))
    for name, proof in fast.fxopt.report.proofs.items():
        assert proof.holds, (name, proof)
        assert proof.writes == 2 * stock.config.num_hidden_layers


def test_aot_eager_backend() -> None:
    stock = tiny("llama")
    fast = fxopt.optimize(stock, max_len=MAX_LEN, backend="aot_eager", chunk=CHUNK)
    assert_same(stock, fast, prompt(1, LONGEST))
    assert_same(stock, fast, *left_padded(3, 20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_verify(dtype: torch.dtype) -> None:
    """Half precision may round differently; what is checked is that verification passes and generation runs."""
    stock = tiny("llama", dtype)
    fast = fxopt.optimize(stock, max_len=64, backend="eager", strict=True)
    assert fast.generate(prompt(1, 8), max_new_tokens=8).shape == (1, 16)
    assert [check.error <= check.allowed for check in fast.fxopt.report.checks] == [True, True]
