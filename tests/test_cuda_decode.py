"""Decode attention on a GPU: what the kernels compute is what the stock model says, and the report tells the times.

The kernels by themselves are in test_split_attention.py, which runs on a GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxopt
from fxopt.families import tiny

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("form", ["auto", "sums", "split", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens(form: Any, dtype: torch.dtype) -> None:
    stock = tiny("llama").to("cuda", dtype)
    fast = fxopt.optimize(stock, 256, passes={"decode_attention": {"form": form}}, max_batch=2)
    matched = fast.fxopt.report["decode_attention"].matched
    assert matched == 2 if form in ("sums", "split") else matched in (0, 2)
    prompt = torch.arange(2, 202, device="cuda").reshape(2, 100) % 90
    got = fast(prompt).logits.float()
    want = stock(prompt).logits.float()
    assert float((got - want).abs().max()) < {torch.float32: 1e-3}.get(dtype, 0.1)
    if dtype is torch.float32:
        want_tokens = stock.generate(prompt, max_new_tokens=40, do_sample=False)
        assert torch.equal(fast.generate(prompt, max_new_tokens=40, do_sample=False), want_tokens)


def test_the_report_says_what_was_timed() -> None:
    fast = fxopt.optimize(tiny("llama").to("cuda", torch.float16), 2048)
    timed = fast.fxopt.report.attention
    assert timed is not None
    assert [one.form for one in timed.times] == ["library", "sums", "split"]
    assert all(one.seconds for one in timed.times), timed
    assert "decode attention: " in str(fast.fxopt.report)
