"""``torch.compile(model, backend="fxopt")``: any language model gives what it gave, whatever is asked or goes wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import list_backends, lookup_backend
from under_dynamo import (
    COUNTS,
    NOTHING,
    WITHOUT_INDUCTOR,
    assert_alike,
    compiled,
    counts,
    logits,
    only_report,
    said,
    tokens,
)

import fxopt
from fxopt import dynamo_backend, dynamo_graph
from fxopt.dynamo_backend import last_reports
from fxopt.families import tiny
from fxopt.passes.fuse_qkv import FuseQKV, Projections
from fxopt.program import Program
from fxopt.rewrite import Pass

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("family", COUNTS)
def test_families_give_what_they_gave(family: str) -> None:
    model = tiny(family)
    fast = compiled(model)
    for batch, length in ((2, 7), (3, 9), (4, 12)):
        assert_alike(fast, model, tokens(batch, length))
    assert_alike(model, tiny(family))  # the stock model is as it was
    for report in last_reports():
        assert counts(report) == COUNTS[family]
        assert report.left_alone == (None if any(COUNTS[family]) else NOTHING)


def test_what_was_done_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fxopt"):
        logits(compiled(tiny("llama")), tokens())
    report = only_report()
    assert any("fuse_qkv: 2 rewritten" in message for message in said(caplog))
    assert "packed weights: 192KB, no second copy" in str(report)
    assert report["fuse_qkv"].sites[0].source.startswith("modeling_")
    assert [site.layer for site in report["fuse_gate_up"].sites] == [0, 1]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache(cache: str, other_versions: str) -> None:
    model, stock = tiny("llama"), tiny("llama")
    asked: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if cache == "static":
        asked |= {"cache_implementation": "static", "disable_compile": True}
    model.forward = compiled(model.forward)
    assert model.generate(tokens(), **asked).tolist() == stock.generate(tokens(), **asked).tolist()
    found = counts(last_reports()[-1])
    grouped = 0 if cache == "dynamic" else 2  # without a mask Transformers itself expands no heads
    assert found == (grouped, 2, 2) or (other_versions and found == (2, 2, 2))  # older ones expand them all the same


def test_marked_sizes_compile_once() -> None:
    model: Any = tiny("llama")
    fast: Any = torch.compile(model, backend="fxopt", fullgraph=True, options=WITHOUT_INDUCTOR)
    for batch, length in ((2, 7), (3, 9), (5, 21)):
        ids = tokens(batch, length)
        mask = torch.ones_like(ids)
        for tensor in (ids, mask):
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 1)
        with torch.no_grad():
            found = fast(ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found, model(ids, attention_mask=mask, use_cache=False).logits)
    assert counts(only_report()) == (2, 2, 2)


def test_numbers_may_be_symbols_too() -> None:
    """Under ``dynamic=True`` Dynamo hands in every float of the model."""
    model = tiny("llama")
    fast = torch.compile(model, backend="fxopt", dynamic=True, options=WITHOUT_INDUCTOR)
    for length in (7, 9):
        assert_alike(fast, model, tokens(2, length))
    assert counts(last_reports()[-1]) == (2, 2, 2)


def test_two_models_and_one_twice() -> None:
    first, second = tiny("llama"), tiny("llama")
    with torch.no_grad():
        second.lm_head.weight.mul_(2)
    faces = [(compiled(first), first), (compiled(second), second), (compiled(first), first)]
    for _ in range(2):
        for fast, stock in faces:
            assert_alike(fast, stock)
    copied = copy.deepcopy(first)
    assert_alike(compiled(copied), tiny("llama"))


@dataclass(frozen=True)
class Raises(Pass[Projections]):
    name = "raises"
    summary = "fails"

    def find(self, program: Program) -> Iterator[Projections]:
        raise KeyError("input_ids")


@dataclass(frozen=True)
class Transposes(Pass[Projections]):
    name = "transposes"
    summary = "hands out something that looks otherwise"

    def finish(self, program: Program, matched: int) -> None:
        with program.graph.inserting_before(program.output()):
            other = program.graph.call_function(torch.ops.aten.transpose.int, (program.logits(), 0, 1))
        program.output().args = ((other, *program.results()[1:]),)

    def find(self, program: Program) -> Iterator[Projections]:
        return iter(())


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (Raises(), "raises failed with KeyError: 'input_ids'"),
        (Transposes(), "transposes changed dtypes, shapes or strides of what the graph hands out"),
    ],
)
def test_a_broken_pass_falls_through(broken: Pass[Any], sentence: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    assert_alike(compiled(model, passes=["fuse_qkv", broken]), tiny("llama"))
    assert only_report().left_alone == f"RewriteError: {sentence}"
    assert said(caplog) == [f"graph {only_report().number} goes to aot_eager as it came, RewriteError: {sentence}"]
    assert model.model.layers[0].self_attn.q_proj.weight.untyped_storage().nbytes() == 64 * 64 * 4


@pytest.mark.parametrize(("where", "name"), [(dynamo_graph, "make_fx"), (dynamo_backend, "lifted")])
def test_a_failure_on_the_way_falls_through(
    where: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(where, name, fails)
    model = tiny("llama")
    assert_alike(compiled(model), model)
    assert only_report().left_alone == "RuntimeError: no"
    assert said(caplog) == [f"graph {only_report().number} goes to aot_eager as it came, RuntimeError: no"]


@pytest.mark.parametrize(
    ("passes", "applied"),
    [
        (None, {"remove_control_flow", "grouped_attention", "fuse_qkv", "fuse_gate_up"}),
        ("default", {"remove_control_flow", "grouped_attention", "fuse_qkv", "fuse_gate_up"}),
        ("minimal", {"remove_control_flow"}),
        (["fuse_qkv"], {"remove_control_flow", "fuse_qkv"}),
        ({"fuse_qkv": False, "static_kv": False}, {"remove_control_flow", "grouped_attention", "fuse_gate_up"}),
        ({"remove_control_flow": False}, {"grouped_attention", "fuse_qkv", "fuse_gate_up"}),
        ([FuseQKV(), Raises], {"remove_control_flow", "fuse_qkv", "raises"}),
        ([fxopt.Only(FuseQKV(), [1])], {"remove_control_flow", "fuse_qkv"}),
    ],
)
def test_passes_are_selected_as_for_optimize(passes: Any, applied: set[str]) -> None:
    assert {rewriter.name for rewriter in dynamo_backend.selected(passes)} == applied


def test_a_pass_at_some_places_only() -> None:
    model = tiny("llama")
    assert_alike(compiled(model, passes={"fuse_qkv": fxopt.Only(FuseQKV(), [1])}), model)
    assert counts(only_report()) == (2, 1, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"passes": ["static_kv"]}, "static_kv is for graphs that fxopt.optimize makes, so torch.compile cannot"),
        ({"passes": {"matvec": True}}, "matvec is for graphs that fxopt.optimize makes"),
        ({"passes": ["fuse_qkw"]}, "no pass named 'fuse_qkw'; did you mean fuse_qkv?"),
        ({"passes": 3}, "passes=3 is neither a preset"),
        ({"backend": "fxopt"}, "goes in a circle"),
        ({"backend": "aot_eager", "max_autotune": True}, "max_autotune cannot be set for aot_eager"),
        ({"max_autotunes": True}, "no option 'max_autotunes', neither of fxopt nor of Inductor; did you mean"),
    ],
)
def test_a_request_that_cannot_be_served(options: dict[str, Any], sentence: str) -> None:
    fast = torch.compile(nn.Linear(2, 2).requires_grad_(False), backend="fxopt", options=options)
    with pytest.raises(Exception, match=sentence.replace("?", r"\?")):
        fast(torch.ones(1, 2))


def test_modes_are_those_of_inductor() -> None:
    compiler = dynamo_backend._asked("max-autotune", None)[1]
    assert dict(compiler.settings)["max_autotune"] is True


def test_pytorch_knows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."torch_dynamo_backends"]\nfxopt = "fxopt.dynamo_backend:backend"\n' in project
    assert "fxopt" in list_backends()
    assert lookup_backend("fxopt") is dynamo_backend.backend

    known: list[str] = []
    monkeypatch.setattr(dynamo_backend, "entry_points", lambda **_: ())
    monkeypatch.setattr(dynamo_backend, "register_backend", lambda function, name: known.append(name))
    dynamo_backend._make_known()
    assert known == ["fxopt"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_through_inductor(family: str) -> None:
    model, stock = tiny(family), tiny(family)
    fast = torch.compile(model, backend="fxopt")
    for batch, length in ((2, 7), (3, 9), (4, 11)):
        assert_alike(fast, stock, tokens(batch, length))
    assert all(counts(report) == COUNTS[family] and report.left_alone is None for report in last_reports())
