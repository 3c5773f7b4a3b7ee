"""Programs that are no language models under ``torch.compile(backend="fxopt")``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5Model
from under_dynamo import NOTHING, Attention, compiled, counts, only_report, tokens

from fxopt.dynamo_backend import last_reports
from fxopt.families import VOCABULARY

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(
    ("twist", "matched", "reason"),
    [
        ("", 1, ""),
        ("products", 1, ""),
        ("copied", 1, ""),
        ("read twice", 1, "other attention reads the same projections"),
        ("input written", 0, "view is written into between them"),
        ("handed out", 0, "linear_1 is handed out, and would be a part of a larger tensor"),
        ("tied", 0, "two of them are the same memory"),
    ],
)
@torch.no_grad()
def test_any_program(twist: str, matched: int, reason: str) -> None:
    """No language model, and things that a captured one never does."""
    model = Attention(twist)
    stock = copy.deepcopy(model)
    fast = compiled(model)
    for shape in ((2, 5, 32), (3, 6, 32)):
        x = torch.randn(shape)
        found, wanted = fast(x), stock(x)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.stride() == other.stride()
    assert last_reports()[-1]["fuse_qkv"].matched == matched
    outcome = last_reports()[0]["fuse_qkv"]
    assert reason in " ".join(spot.reason for spot in (*outcome.refused, *outcome.near))
    if twist == "copied":
        found[1].zero_()
        torch.testing.assert_close(found[0], wanted[0])


class Gated(nn.Module):
    """A gated product behind some control flow, with a buffer that is written."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.gate, self.up, self.norm = nn.Linear(8, 12), nn.Linear(8, 12), nn.BatchNorm1d(12)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "arithmetic":
                x = torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: torch.sin(x) - 1, (x,))
            case "may fail":
                x = torch.cond(x.sum() > 0, lambda x: x[:, torch.arange(8)], lambda x: x - 1, (x,))
            case "check":
                torch._assert_async(x.sum() < 100, "too much")
                x = x + torch.tensor([1.0] * 8)
            case "silent check":
                torch._assert_async(x.sum() < 100)
            case "vmap":
                x = torch.vmap(lambda row: row * row.sum())(x)
            case "no_grad":
                with torch.no_grad():
                    x = x * 2
            case "autocast off":
                with torch.autocast("cpu", enabled=False):
                    x = x * 2
            case "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = (x @ torch.eye(8)).float()
        return self.norm(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "inlined", "left_alone"),
    [
        ("", 0, None),
        ("arithmetic", 1, None),
        ("may fail", 0, None),
        ("check", 0, None),
        ("silent check", 0, "_assert_async is called for what it does, not for what it returns"),
        ("vmap", 0, "belongs to a transform of torch.func"),
        ("no_grad", 0, None),
        ("autocast off", 0, None),
        ("autocast", 0, "_enter_autocast switches autocast on"),
    ],
)
def test_control_flow(kind: str, inlined: int, left_alone: str | None) -> None:
    model = Gated(kind).requires_grad_(False)
    stock = copy.deepcopy(model)
    fast = compiled(model)
    for sign in (1, -1, 1):
        x = torch.randn(5, 8) * 0.1 + sign
        torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.norm.running_mean, stock.norm.running_mean)
    report = only_report()
    assert (left_alone or "None") in str(report.left_alone)
    if left_alone is None:
        assert report["fuse_gate_up"].matched == 1
        assert -report["remove_control_flow"].ops.get("cond", 0) == inlined
    if kind == "check":
        with pytest.raises(RuntimeError, match="too much"):
            fast(torch.full((5, 8), 10.0))


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "feed_forward_proj": "gated-gelu"}


@pytest.mark.parametrize(
    ("make", "inputs", "matched"),
    [
        (lambda: BertModel(BertConfig(**SMALL, intermediate_size=128)), ("input_ids",), (0, 2, 0)),
        (lambda: T5Model(T5Config(vocab_size=VOCABULARY, **GATED_T5)), ("input_ids", "decoder_input_ids"), (0, 2, 2)),
    ],
    ids=["bert", "t5"],
)
@torch.no_grad()
def test_other_transformers(
    make: Callable[[], Any], inputs: tuple[str, ...], matched: tuple[int, ...], other_versions: str
) -> None:
    """An encoder; and a model with cross-attention, whose query reads another input than key and value do."""
    model = make().eval()
    arguments = {name: tokens() for name in inputs}
    wanted = model(**arguments).last_hidden_state
    torch.testing.assert_close(compiled(model)(**arguments).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    found = [counts(report) for report in last_reports()]
    assert len(found) == 1 or other_versions  # older Transformers break T5's graph in two
    assert tuple(map(sum, zip(*found, strict=True))) == matched


def test_autocast_is_left_alone() -> None:
    model = Attention()
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert only_report().left_alone == "autocast is on"


def test_what_has_no_weights_is_left_alone() -> None:
    fast = compiled(lambda x: torch.relu(x).sum())
    assert fast(torch.ones(3)) == 3
    assert only_report().left_alone == NOTHING
