"""The public face: what comes back, what it shares with the stock model, and what the report says."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM, PreTrainedModel

import fxopt
from fxopt.families import tiny
from fxopt.passes import DEFAULT_PASSES
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.registry import TAKEN

TOKENS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return tiny("qwen2")  # biases in q, k and v


@pytest.fixture(scope="module")
def before(stock: PreTrainedModel) -> dict[str, torch.Tensor]:
    return copy.deepcopy(stock.state_dict())


@pytest.fixture(scope="module")
def fast(stock: PreTrainedModel, before: dict[str, torch.Tensor]) -> Any:
    return fxopt.optimize(stock, max_len=64, backend="eager")


def test_it_is_still_the_model(stock: PreTrainedModel, fast: Any) -> None:
    assert isinstance(fast, type(stock))
    assert type(fast).__name__ == type(stock).__name__
    assert type(stock).forward is not type(fast).forward
    assert not hasattr(stock, "fxopt")
    assert fast.config is stock.config


def test_weights_are_shared_and_equal(stock: PreTrainedModel, fast: Any, before: dict[str, torch.Tensor]) -> None:
    for model in (stock, fast):
        state = model.state_dict()
        assert list(state) == list(before)
        assert all(torch.equal(state[name], value) for name, value in before.items())
    ours = {name: parameter.data_ptr() for name, parameter in fast.named_parameters()}
    assert ours == {name: parameter.data_ptr() for name, parameter in stock.named_parameters()}


def test_weights_updated_in_place_are_seen_by_both(stock: PreTrainedModel, fast: Any) -> None:
    weight = stock.model.layers[0].self_attn.k_proj.weight
    old = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(0.05)
        expected = stock.generate(TOKENS, max_new_tokens=12, do_sample=False)
        assert fast.generate(TOKENS, max_new_tokens=12, do_sample=False).tolist() == expected.tolist()
    finally:
        with torch.no_grad():
            weight.copy_(old)


@pytest.mark.parametrize("which", ["stock", "fast"])
def test_save_pretrained_round_trip(
    stock: PreTrainedModel, fast: Any, before: dict[str, torch.Tensor], tmp_path: Path, which: str
) -> None:
    (stock if which == "stock" else fast).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(stock).__name__
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copying_is_refused_with_a_sentence(fast: Any, duplicate: Any) -> None:
    with pytest.raises(fxopt.InvalidRequestError, match="cannot be copied"):
        duplicate(fast)


def test_a_model_that_was_asked_for_hidden_states_before() -> None:
    """Transformers leaves its collecting hooks on the modules for good."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    stock(TOKENS, output_hidden_states=True)
    fast: Any = fxopt.optimize(stock, max_len=32, backend="eager")
    expected = stock.generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert fast.generate(TOKENS, max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
    assert len(fast(TOKENS, output_hidden_states=True).hidden_states) == 2


def test_graphs(fast: Any) -> None:
    graphs = fast.fxopt.graphs
    assert set(graphs) == {"symbolic", "prefill", "decode"}
    assert all(isinstance(graph, GraphModule) for graph in graphs.values())


def test_report_as_data_and_as_text(fast: Any) -> None:
    report = fast.fxopt.report
    data = json.loads(json.dumps(report.to_dict()))
    rows = {row["name"]: row for row in data["stages"]}
    assert [name for name in rows if name not in TAKEN] == [kind.name for kind in DEFAULT_PASSES]
    assert all(row["step"]["launches"] > 0 for row in rows.values())
    assert (rows["static_kv"]["expected"], rows["static_kv"]["matched"]) == (4, 4)
    assert (rows["fuse_qkv"]["expected"], rows["fuse_qkv"]["matched"]) == (2, 2)
    refused = rows["matvec"]["refused"]
    assert refused
    assert set(refused[0]) == {"node", "source", "layer", "reason"}
    assert "eager" in refused[0]["reason"]
    text = str(report)
    assert all(kind.name in text for kind in DEFAULT_PASSES)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "alike" in text  # equal refusals are one line


def test_source_lines_lead_to_model_code(fast: Any) -> None:
    sources = {row["source"] for row in fast.fxopt.report.to_dict()["stages"][-1]["refused"]}
    assert all(source.startswith("modeling_qwen2.py:") for source in sources), sources


def test_optimising_the_stock_model_again_packs_nothing_twice(stock: PreTrainedModel, fast: Any) -> None:
    pointers = [parameter.data_ptr() for parameter in stock.parameters()]
    again = fxopt.optimize(stock, max_len=32, backend="eager")
    assert [parameter.data_ptr() for parameter in stock.parameters()] == pointers
    expected = stock.generate(TOKENS, max_new_tokens=12, do_sample=False).tolist()
    assert again.generate(TOKENS, max_new_tokens=12, do_sample=False).tolist() == expected
    assert fast.generate(TOKENS, max_new_tokens=12, do_sample=False).tolist() == expected


SELECTIONS: dict[str, tuple[Any, set[str]]] = {
    "one switched off": ({"fuse_qkv": False}, {"fuse_qkv"}),
    "names": (["window_kv"], {kind.name for kind in DEFAULT_PASSES if not kind.required} - {"window_kv"}),
    "preset": ("minimal", {kind.name for kind in DEFAULT_PASSES if not kind.required}),
    "object": ([FuseQKV()], {kind.name for kind in DEFAULT_PASSES if not kind.required} - {"fuse_qkv"}),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selected_passes_and_the_same_tokens(stock: PreTrainedModel, selection: str) -> None:
    passes, absent = SELECTIONS[selection]
    fast = fxopt.optimize(stock, max_len=64, backend="eager", passes=passes)
    assert {kind.name for kind in DEFAULT_PASSES} - {o.name for o in fast.fxopt.report.passes} == absent
    expected = stock.generate(TOKENS, max_new_tokens=20, do_sample=False)
    assert fast.generate(TOKENS, max_new_tokens=20, do_sample=False).tolist() == expected.tolist()


@pytest.mark.parametrize("left_out", [kind.name for kind in DEFAULT_PASSES if not kind.required])
def test_every_pass_can_be_left_out_alone(stock: PreTrainedModel, left_out: str) -> None:
    """Passes stand on the required ones only, not on each other."""
    fast = fxopt.optimize(stock, max_len=64, backend="eager", passes={left_out: False}, strict=True)
    expected = stock.generate(TOKENS, max_new_tokens=20, do_sample=False)
    assert fast.generate(TOKENS, max_new_tokens=20, do_sample=False).tolist() == expected.tolist()


def test_a_report_can_be_copied_and_pickled_before_anybody_has_read_it() -> None:
    report = fxopt.optimize(tiny("llama"), max_len=64, backend="eager").fxopt.report
    copied, kept = copy.deepcopy(report), pickle.loads(pickle.dumps(report))
    assert copied == kept == report
    assert kept["fuse_qkv"].step is not None
    assert kept.diff("fuse_qkv") == report.diff("fuse_qkv")
