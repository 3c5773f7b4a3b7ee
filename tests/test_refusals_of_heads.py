"""Heads that last_logits must leave alone: the sentence, the node, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edited_programs import CAPACITY, assert_refused, assert_same_numbers, attempt, before, edited, replaced, static
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.families import tiny
from fxopt.passes.last_logits import LastLogits
from fxopt.program import LOGIT_POSITIONS

aten = torch.ops.aten


class Product(nn.Module):
    """A head that is a product with a transposed matrix."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.t())


class Softmaxed(Product):
    """A head with something behind it that mixes the logits of one position."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).log_softmax(-1)


@pytest.mark.parametrize(("head", "op"), [(Product, "aten.matmul.default"), (Softmaxed, "aten.log_softmax.int")])
def test_a_head_that_is_not_linear(head: type[Product], op: str) -> None:
    stock = tiny("llama", num_hidden_layers=1)
    stock.lm_head = head(stock.lm_head)
    program = capture(stock, max_len=32, capacity=CAPACITY)
    result, outcome = attempt(LastLogits(), program)
    assert (outcome.matched, outcome.expected) == (0, 1)
    assert_refused(program, outcome, f"the logits are computed by {op}", "not by a linear layer")
    assert LOGIT_POSITIONS not in result.placeholders()
    assert_same_numbers(program, result)


def test_generation_with_a_head_that_is_not_linear() -> None:
    """The optimised model computes all logits and picks one row: the same tokens."""
    stock = tiny("llama", num_hidden_layers=1)
    stock.lm_head = Product(stock.lm_head)
    fast: Any = fxopt.optimize(stock, 32, backend="eager")
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()


def test_a_head_over_flattened_rows() -> None:
    with edited(static()) as program:
        head = program.logits()
        replaced(head, 0, before(program, head, aten.flatten.using_ints, head.args[0], 0, 1))
    result, outcome = attempt(LastLogits(), program)
    assert outcome.matched == 0
    assert_refused(program, outcome, "linear_7", "2 dimensions", "[batch, step, hidden]")
    assert_same_numbers(program, result)


class PerToken(Product):
    """Logits times something of each token: as many rows as tokens were fed."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * x.mean(-1, keepdim=True)


def test_a_factor_per_token_behind_the_head() -> None:
    stock = tiny("llama", num_hidden_layers=1)
    stock.lm_head = PerToken(stock.lm_head)
    fast: Any = fxopt.optimize(stock, 32, backend="eager")
    tokens = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()
