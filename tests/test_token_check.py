"""``fxopt.verify``: the user's prompts, told apart to the token."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch

import fxopt
from fxopt.families import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
NEW = 12


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def fast(stock: Any) -> Any:
    return fxopt.optimize(stock, 64, backend="eager")


class Words:
    """A tokenizer of one number per word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: list[int]) -> str:
        return "-".join(map(str, tokens))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_same_tokens(stock: Any, fast: Any, batch_size: int) -> None:
    check = fxopt.verify(stock, fast, PROMPTS, max_new_tokens=NEW, batch_size=batch_size)
    assert check.same
    assert check.stock_hash == check.fast_hash
    assert [(p.tokens, p.agreed, p.divergence, p.margin) for p in check.prompts] == [(NEW, NEW, None, None)] * 3
    assert all(0 < p.max_error < 1e-4 for p in check.prompts)
    assert all(0 < p.mean_error < p.max_error for p in check.prompts)
    assert "the same tokens" in str(check)


def test_the_hash_is_of_what_was_said(stock: Any, fast: Any) -> None:
    """sha256 of the decoded batch, its first eight digits."""
    check = fxopt.verify(stock, fast, ["5 6 7", "13"], tokenizer=Words(), max_new_tokens=NEW)
    said = [
        stock.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)[0, len(row) :]
        for row in ([5, 6, 7], [13])
    ]
    text = "\n".join("-".join(map(str, row.tolist())) for row in said)
    assert check.stock_hash == hashlib.sha256(text.encode()).hexdigest()[:8]
    assert check.prompts[0].prompt == "5 6 7"


def test_a_difference_is_located(stock: Any) -> None:
    """Another model: the first token that differs, and how sure the stock model was of its own."""
    other: Any = tiny("llama")
    with torch.no_grad():
        other.lm_head.weight.add_(
            0.3 * torch.randn(other.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    check = fxopt.verify(stock, other, PROMPTS, max_new_tokens=NEW)
    assert not check.same
    assert check.stock_hash != check.fast_hash
    assert "DIFFERENT TOKENS" in str(check)
    for row, found in zip(PROMPTS, check.prompts, strict=True):
        if found.same:
            continue
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
        wanted, said = (m.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for m in (stock, other))
        assert found.divergence == found.agreed == next(i for i in range(NEW) if wanted[i] != said[i])
        with torch.no_grad():
            logits = stock(torch.tensor([row + wanted[: found.divergence]])).logits[0, -1]
        margin = float(logits[wanted[found.divergence]] - logits[said[found.divergence]])
        assert found.margin == pytest.approx(margin, rel=1e-3)
        assert found.max_error > 1e-2


def test_as_data(stock: Any, fast: Any) -> None:
    data = json.loads(json.dumps(fxopt.verify(stock, fast, PROMPTS[:1], max_new_tokens=2).to_dict()))
    assert data["same"] is True
    assert data["prompts"][0]["tokens"] == 2


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "no prompts"),
        (["some text"], "no tokenizer was given"),
        (5, "give texts, or rows of token ids"),
        ([1, 2, 3], "give texts, or rows of token ids"),
        ({"input_ids": [[1]]}, "give texts, or rows of token ids"),
        ([[]], "a prompt is empty"),
    ],
)
def test_prompts_that_are_none(stock: Any, fast: Any, prompts: Any, words: str) -> None:
    with pytest.raises(fxopt.InvalidRequestError, match=words):
        fxopt.verify(stock, fast, prompts)
