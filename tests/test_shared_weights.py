"""Layers that share weights: packed once, for all of them, or left alone with a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.dynamo_backend import last_reports
from fxopt.errors import CaptureError
from fxopt.families import VOCABULARY, tiny
from fxopt.origin import layer_of

LAYERS = 4
TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def generate(model: Any) -> list[list[int]]:
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    found: list[list[int]] = model.generate(
        TOKENS, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    ).tolist()
    return found


def optimised(stock: Any, **options: Any) -> Any:
    """Optimised, and nothing went wrong that fxopt could go on from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fxopt goes on.*")
        fast = fxopt.optimize(stock, 64, backend="eager", **options)
    assert generate(fast) == generate(stock)
    return fast


def whole_mlp(layers: Any, a: int, b: int) -> None:
    layers[b].mlp = layers[a].mlp


def gate_and_up(layers: Any, a: int, b: int) -> None:
    for name in ("gate_proj", "up_proj"):
        getattr(layers[b].mlp, name).weight = getattr(layers[a].mlp, name).weight


def gate(layers: Any, a: int, b: int) -> None:
    layers[b].mlp.gate_proj.weight = layers[a].mlp.gate_proj.weight


def gate_as_up(layers: Any, a: int, b: int) -> None:
    layers[b].mlp.up_proj.weight = layers[a].mlp.gate_proj.weight


def projections(layers: Any, a: int, b: int) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layers[b].self_attn, name).weight = getattr(layers[a].self_attn, name).weight


def query(layers: Any, a: int, b: int) -> None:
    layers[b].self_attn.q_proj.weight = layers[a].self_attn.q_proj.weight


def key_as_value(layers: Any, a: int, b: int) -> None:
    layers[b].self_attn.v_proj.weight = layers[b].self_attn.k_proj.weight


@pytest.mark.parametrize(
    ("share", "name", "matched", "why"),
    [
        (whole_mlp, "fuse_gate_up", 2, None),
        (gate_and_up, "fuse_gate_up", 2, None),
        (gate, "fuse_gate_up", 1, "another layer shares"),
        (gate_as_up, "fuse_gate_up", 1, "another layer shares"),
        (projections, "fuse_qkv", 2, None),
        (query, "fuse_qkv", 1, "another layer shares"),
        (key_as_value, "fuse_qkv", 1, "two of them are the same memory"),
    ],
)
def test_layers_that_share(share: Callable[..., None], name: str, matched: int, why: str | None) -> None:
    stock: Any = tiny("llama")
    share(stock.model.layers, 0, 1)
    outcome = optimised(stock, passes=["fuse_qkv", "fuse_gate_up"]).fxopt.report[name]
    assert outcome.matched == matched
    assert [why in spot.reason for spot in outcome.refused] == ([True] if why else [])


@pytest.mark.parametrize("compile", ["whole", "layer"])
def test_updates_in_place_are_seen_by_all(compile: str) -> None:
    stock: Any = tiny("llama", layers=LAYERS)
    whole_mlp(stock.model.layers, 0, 2)
    gate(stock.model.layers, 1, 3)
    before, fast = generate(stock), optimised(stock, compile=compile)
    with torch.no_grad():
        for layer in stock.model.layers[:2]:
            layer.mlp.gate_proj.weight.mul_(-2)
    assert generate(fast) == generate(stock) != before


def test_a_shared_weight_is_packed_once_and_counted_once() -> None:
    apart: Any = tiny("llama")
    shared: Any = tiny("llama")
    whole_mlp(shared.model.layers, 0, 1)
    mlp = sum(shared.model.layers[0].mlp.get_parameter(f"{name}.weight").nbytes for name in ("gate_proj", "up_proj"))
    assert optimised(shared).fxopt.report.packed_bytes == optimised(apart).fxopt.report.packed_bytes - mlp


class Halves(nn.Module):
    """A head whose own code joins one weight with two others in turn."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.top, self.left, self.right = (nn.Parameter(torch.randn(VOCABULARY // 2, hidden)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.cat([self.top, self.left]), torch.cat([self.top, self.right])
        return nn.functional.linear(x, left) + 2 * nn.functional.linear(x, right)


def test_a_weight_that_the_model_itself_joins_with_two_others() -> None:
    stock: Any = tiny("llama", num_hidden_layers=1)
    torch.manual_seed(0)
    stock.lm_head = Halves(stock.config.hidden_size)
    before, fast = generate(stock), optimised(stock)
    with torch.no_grad():
        stock.lm_head.top.mul_(-2)
    assert generate(fast) == generate(stock) != before


@pytest.mark.usefixtures("fresh_dynamo")
def test_under_torch_compile() -> None:
    stock: Any = tiny("llama", layers=LAYERS)
    whole_mlp(stock.model.layers, 0, 2)
    gate(stock.model.layers, 1, 3)
    fast: Any = torch.compile(stock, backend="fxopt", options={"backend": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(fast(TOKENS).logits, stock(TOKENS).logits, rtol=1e-4, atol=1e-4)
    (report,) = last_reports()
    assert report["fuse_gate_up"].matched == 3


def test_saved_and_loaded(tmp_path: Any) -> None:
    stock: Any = tiny("llama")
    whole_mlp(stock.model.layers, 0, 1)
    fast = optimised(stock)
    layers = [
        layer_of(node) for node in fast.fxopt.graphs["decode"].graph.nodes if node.target is torch.ops.aten.silu.default
    ]
    assert layers == [0, 1]  # although the code of one module runs in both
    fast.fxopt.save(tmp_path / "saved")
    assert generate(fxopt.load(tmp_path / "saved", stock)) == generate(stock)


def test_a_shared_attention_module_has_one_place_in_the_cache() -> None:
    stock: Any = tiny("llama")
    stock.model.layers[1].self_attn = stock.model.layers[0].self_attn
    with pytest.raises(
        CaptureError, match=r"layer 0 .*4 rows of two tokens.* share an attention module; use the stock"
    ):
        fxopt.optimize(stock, 64, backend="eager")
