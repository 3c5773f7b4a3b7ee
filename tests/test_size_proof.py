"""What PyTorch cannot show of sizes is shown here, or the model is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from sympy import Eq, Ne
from torch import Tensor
from torch._dynamo.exc import UserError, UserErrorType
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import Max, Min

import fxopt
from fxopt.errors import CaptureError
from fxopt.families import tiny
from fxopt.request import Request
from fxopt.size_proof import unproven
from fxopt.symbols import expression, fresh_size

Claim = Callable[[sympy.Expr, sympy.Expr, sympy.Expr], sympy.Basic]


def asserting(claim: Claim) -> tuple[Graph, dict[sympy.Symbol, sympy.Expr]]:
    """A graph that asserts something of a step, a past, and a width that is both together."""
    env = ShapeEnv()
    step, past, width = (expression(fresh_size(env, name, hint)) for name, hint in (("s", 7), ("p", 11), ("w", 18)))
    assert step is not None
    assert past is not None
    assert width is not None
    graph = Graph()
    condition = graph.placeholder("condition")
    condition.meta["val"] = env.create_symboolnode(claim(step, past, width))
    graph.call_function(torch.ops.aten._assert_scalar.default, (condition, "or else"))
    return graph, {width: step + past}


@pytest.mark.parametrize(
    "claim",
    [
        lambda s, p, w: Eq(Min(16 * s, 64 * s), 16 * s),
        lambda s, p, w: Eq(Min(16 * (s + p), 64 * s + 64 * p), 16 * s + 16 * p),
        lambda s, p, w: Eq(Max(s * (s + p), 4 * s * (s + p)), 4 * s * (s + p)),
        lambda s, p, w: 64 * s + 4 * (4 * p - 1) * Min(16 * s, 64 * s) <= 256 * p * s,
        lambda s, p, w: s + p <= w,
        lambda s, p, w: Eq(w, 1) | Eq(s + p, w),
        lambda s, p, w: Ne(s, 0),
        lambda s, p, w: sympy.true,
    ],
)
def test_what_holds_for_all_sizes(claim: Claim) -> None:
    assert unproven(*asserting(claim)) is None


@pytest.mark.parametrize(
    "claim",
    [
        lambda s, p, w: s < 17,
        lambda s, p, w: Eq(s, p),
        lambda s, p, w: Eq(Min(16 * s, 64 * p), 16 * s),
        lambda s, p, w: Ne(s, 3),
        lambda s, p, w: (s + p <= w) & (s < 17),
        lambda s, p, w: sympy.false,
    ],
)
def test_what_does_not(claim: Claim) -> None:
    assert unproven(*asserting(claim)) is not None


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that shows nothing of sizes by itself."""
    export = torch.export.export

    def refusing(*args: Any, **options: Any) -> Any:
        if not options.get("prefer_deferred_runtime_asserts_over_guards"):
            raise UserError(UserErrorType.CONSTRAINT_VIOLATION, "not shown")
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", refusing)


def tokens(model: Any) -> Tensor:
    prompt = torch.tensor([[1, 1, *range(2, 20)], list(range(5, 25))])
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    found: Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1)
    return found


@pytest.mark.parametrize("family", ["bloom", "llama", "gemma2"])
def test_the_same_tokens(family: str, unable: None) -> None:
    stock = tiny(family)
    fast = fxopt.optimize(stock, 64, chunk=16, backend="aot_eager", strict=True)
    assert torch.equal(tokens(fast), tokens(stock))


def test_code_that_goes_two_ways_is_refused() -> None:
    model = tiny("llama")
    norm = model.model.norm
    norm.forward = lambda x, own=norm.forward: own(x) if x.shape[1] < 17 else own(x) * 2
    with pytest.raises(CaptureError, match="branches on the length"):
        Request(64).captured(model)


def test_what_is_not_shown_is_refused(
    unable: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fxopt.capture.unproven", lambda graph, known: "s < 17")
    with caplog.at_level(logging.INFO, "fxopt"), pytest.raises(CaptureError, match="symbolic lengths: not shown"):
        Request(64).captured(tiny("llama"))
    assert "the trace is right only where s < 17" in caplog.text
