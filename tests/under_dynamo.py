"""Models under ``torch.compile(backend="fxopt")``, and what is said of their graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from fxopt.dynamo_backend import GraphReport, last_reports
from fxopt.families import VOCABULARY

WITHOUT_INDUCTOR: dict[str, Any] = {"backend": "aot_eager"}
NOTHING = "the passes found nothing that the compiler would not do itself"

#: What is rewritten in the two layers of each: groups of heads, q/k/v, gate/up.
COUNTS = {
    "llama": (2, 2, 2),
    "gemma2": (2, 2, 2),
    "gpt2": (0, 0, 0),
    "gpt_neo": (0, 2, 0),
    "mixtral": (2, 2, 0),
    "qwen3": (2, 2, 2),
    "phi": (2, 2, 0),
}


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="fxopt", options=WITHOUT_INDUCTOR | options)


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """With the first token of the first row masked, so that attention has a mask."""
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    found: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return found


def assert_alike(fast: Any, stock: Any, ids: Tensor | None = None) -> None:
    ids = tokens() if ids is None else ids
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids), rtol=1e-4, atol=1e-4)


def counts(report: GraphReport) -> tuple[int, ...]:
    return tuple(report[name].matched for name in ("grouped_attention", "fuse_qkv", "fuse_gate_up"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fxopt"]


def only_report() -> GraphReport:
    (report,) = last_reports()
    return report


class Attention(nn.Module):
    """Attention of no language model, with one twist at a time."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.twist = twist
        if twist == "tied":
            self.k.weight = self.q.weight

    def forward(self, x: Tensor) -> Any:
        batch, step, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, step, 4, -1).transpose(1, 2)

        if self.twist == "input written":
            x = x.clone()
            same = x.view(batch, step, 32)
            q = self.q(same)
            x.add_(1)
            q, k, v = heads(q), heads(self.k(same)), heads(self.v(same))
        else:
            q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.twist == "products":
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        if self.twist == "read twice":
            mixed = mixed + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = self.o(mixed.transpose(1, 2).reshape(batch, step, 32))
        if self.twist == "handed out":
            return y, k
        if self.twist == "copied":
            return y, y.clone(), x[:]
        return y
