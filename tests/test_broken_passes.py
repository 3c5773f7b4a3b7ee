"""Passes that are wrong on purpose: verify="each" names every one, takes it back, and goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from broken import (
    DoesNotRun,
    ForgetsTheSlidingWindow,
    KeysAsValues,
    LatePositions,
    NarrowNorm,
    SeesPadding,
    ShortWindow,
    SwappedGate,
    SwappedProjections,
    WritesOneRowLate,
    WrongHeadOrder,
    WrongInDecode,
    WrongRotation,
)
from torch import Tensor

import fxopt
from fxopt.errors import VerificationError
from fxopt.families import tiny
from fxopt.passes import DEFAULT_PASSES
from fxopt.program import Program
from fxopt.rewrite import Pass

aten = torch.ops.aten
MAX_LEN = 160


#: family, its options, the dtype, the pass, and the words that say where it was seen
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, Pass[Any], str]] = {
    "K and V swapped": ("llama", {}, torch.float32, SwappedProjections(), "layer"),
    "head order": ("llama", {}, torch.float32, WrongHeadOrder(), "K of layer 1"),
    "gate and up swapped": ("llama", {}, torch.float32, SwappedGate(), "K of layer 1"),
    "positions off by one": ("llama", {}, torch.float32, LatePositions(), "K of layer"),
    "rows off by one": ("llama", {}, torch.float32, WritesOneRowLate(), "layer"),
    "window one short": ("llama", {}, torch.float32, ShortWindow(), "layer 1"),
    "K in the buffer of V": ("llama", {}, torch.float32, KeysAsValues(), "V of layer"),
    "padding attended to": ("llama", {}, torch.float32, SeesPadding(), "layer 1"),
    "rotation sign": ("llama", {}, torch.float32, WrongRotation(), "K of layer"),
    "past the sliding window": (
        "mistral",
        {"sliding_window": 100},
        torch.float32,
        ForgetsTheSlidingWindow(),
        "past the sliding window of 100",
    ),
    "bfloat16 only": ("llama", {}, torch.bfloat16, NarrowNorm(), "layer"),
    "decode only": ("llama", {}, torch.float32, WrongInDecode(), "logits"),
    "does not run": ("llama", {}, torch.float32, DoesNotRun(), "fails when run"),
}


def selection(broken: Pass[Any]) -> list[Any]:
    """Every pass, with the broken one in its place or beside them."""
    return [*(kind for kind in DEFAULT_PASSES if kind.name != broken.name), broken]


def tokens(model: Any) -> list[list[int]]:
    """Greedy, left-padded, past every border that matters here."""
    prompt = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompt)
    mask[1, :11] = 0
    output: Tensor = model.generate(
        prompt, attention_mask=mask, max_new_tokens=MAX_LEN - 30, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    found: list[list[int]] = output.tolist()
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_broken_pass_is_named_and_taken_back(case: str) -> None:
    family, options, dtype, broken, where = CASES[case]
    stock = tiny(family, dtype, **options)
    with pytest.warns(UserWarning, match=f"with {broken.name} applied, .*{where}.*goes on without it"):
        fast = fxopt.optimize(stock, MAX_LEN, passes=selection(broken), backend="eager", verify="each", chunk=16)
    report = fast.fxopt.report
    dropped = {outcome.name: outcome.dropped for outcome in report.passes if outcome.dropped}
    assert set(dropped) == {broken.name}
    for outcome in report.passes:
        assert outcome.name == broken.name or outcome.is_complete, outcome.name
    if dtype is torch.float32:
        assert tokens(fast) == tokens(stock)
    assert f"{broken.name}: dropped" in str(report)
    assert report[broken.name].verified is not None


@pytest.mark.parametrize("case", ["head order", "decode only"])
def test_strict_raises(case: str) -> None:
    family, options, dtype, broken, _ = CASES[case]
    with pytest.raises(VerificationError, match=f"with {broken.name} applied"):
        fxopt.optimize(
            tiny(family, dtype, **options),
            MAX_LEN,
            passes=selection(broken),
            backend="eager",
            verify="each",
            strict=True,
        )


@pytest.mark.parametrize("case", ["past the sliding window", "window one short"])
def test_the_end_is_enough_to_find_it(case: str) -> None:
    """``verify="final"`` looks once; when that fails it goes through pass by pass."""
    family, options, dtype, broken, _ = CASES[case]
    with pytest.warns(UserWarning, match=f"with {broken.name} applied"):
        fast = fxopt.optimize(tiny(family, dtype, **options), MAX_LEN, passes=selection(broken), backend="eager")
    assert {o.name for o in fast.fxopt.report.passes if o.dropped} == {broken.name}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_passes_stay(family: str, dtype: torch.dtype) -> None:
    """The other side of being strict: nothing that is right is dropped, and every check is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = fxopt.optimize(tiny(family, dtype), MAX_LEN, backend="eager", verify="each", chunk=16, strict=True)
    for stage in fast.fxopt.report.stages:
        if stage.matched or stage.stage == "capture":
            assert stage.verified is not None, stage.name
            assert stage.verified.error <= stage.verified.allowed


def test_a_pass_that_stopped_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected 2, matched 0, and what stood where the linear layers should be."""
    monkeypatch.setattr("fxopt.passes.fuse_qkv.LINEAR", frozenset({aten.addmm.default}))
    stock = tiny("llama")
    report = fxopt.optimize(stock, 64, backend="eager").fxopt.report
    assert (report["fuse_qkv"].expected, report["fuse_qkv"].matched) == (2, 0)
    told = " ".join(str(report).split())
    assert "fuse_qkv: matched 0 of 2" in told
    assert "fuse_qkv, layers 0-1, modeling_llama.py" in told or "fuse_qkv, layers 0-1, sdpa_attention.py" in told
    assert "no linear is in front of it; the query comes from" in told
    assert "aten.linear.default" in told  # what the search walked past
    with pytest.raises(fxopt.RewriteError, match=r"fuse_qkv matched 0 of 2 places .*no linear is in front of it"):
        fxopt.optimize(stock, 64, backend="eager", strict=True)


def test_near_misses_name_the_layers() -> None:
    """One layer of three has a bias on k alone."""
    stock: Any = tiny("llama", num_hidden_layers=3)
    attention = stock.model.layers[1].self_attn
    attention.k_proj.bias = torch.nn.Parameter(torch.ones(attention.k_proj.out_features))
    report = fxopt.optimize(stock, 64, backend="eager").fxopt.report
    assert (report["fuse_qkv"].expected, report["fuse_qkv"].matched) == (3, 2)
    assert [(spot.layer, "has a bias" in spot.reason) for spot in report["fuse_qkv"].refused] == [(1, True)]
    assert "fuse_qkv, layer 1, " in str(report)


@dataclass(frozen=True)
class WrongAtTheEnd(Pass[Any]):
    """Matches nothing and edits the whole graph."""

    name = "wrong_at_the_end"
    summary = "broken"

    def find(self, program: Program) -> Iterator[Any]:
        yield from ()

    def finish(self, program: Program, matched: int) -> None:
        logits = program.logits()
        with program.graph.inserting_after(logits):
            negative = program.graph.call_function(aten.neg.default, (logits,))
        logits.replace_all_uses_with(negative, delete_user_cb=lambda user: user is not negative)


@pytest.mark.parametrize("verify", ["final", "each"])
def test_a_pass_without_sites_is_judged_too(verify: Any) -> None:
    stock = tiny("llama")
    with pytest.warns(UserWarning, match="with wrong_at_the_end applied, .*logits"):
        fast = fxopt.optimize(stock, MAX_LEN, passes=[*DEFAULT_PASSES, WrongAtTheEnd()], backend="eager", verify=verify)
    assert tokens(fast) == tokens(stock)


def test_the_report_is_about_the_decode_graph_that_runs() -> None:
    """What a dropped decode pass did is not in the stages behind it."""
    stock = tiny("llama")
    with pytest.warns(UserWarning, match="with wrong_in_decode applied"):
        fast = fxopt.optimize(stock, MAX_LEN, passes=[WrongInDecode(), "matvec"], backend="eager")
    report = fast.fxopt.report
    assert report["wrong_in_decode"].dropped
    running = len(fast.fxopt.graphs["decode"].graph.nodes)
    assert report["matvec"].nodes_after == running
