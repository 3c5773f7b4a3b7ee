"""The pass ``quantize_weights``: what graphs and ``generate`` say with rounded weights, and what cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from edited_programs import attempt, edited, static
from rounded_caches import GREEDY, prompt, rounding_cache
from rounded_models import NAMES, optimised, rounded
from saved_models import edit
from sentences import assert_sentence

import fxopt
from fxopt import ArtifactError
from fxopt.errors import InvalidRequestError
from fxopt.families import tiny
from fxopt.passes.quantize_weights import QuantizeWeights
from fxopt.testing import check_pass
from fxopt.weight_formats import WeightFormatName

aten = torch.ops.aten
LAYERED: dict[str, Any] = {"backend": "aot_eager", "compile": "layer"}


# --- graphs --------------------------------------------------------------------------------------


def test_families() -> None:
    """For int8 see test_passes.py. Weights that are turned, under other operators, and of experts, which stay."""
    outcomes = check_pass(
        QuantizeWeights("int4"), ["llama", "gpt2", "falcon", "mixtral"], matched={"gpt2": 9, "falcon": 9, "mixtral": 5}
    )
    assert [len(outcome.refused) for outcome in outcomes.values()] == [0, 0, 0, 4]


@pytest.mark.parametrize(
    ("name", "dtype"), [("int4", torch.bfloat16), ("int8", torch.float16), ("int4", torch.float64)]
)
def test_other_dtypes(name: WeightFormatName, dtype: torch.dtype) -> None:
    fast = optimised(tiny("llama", dtype), name, verify="final", strict=True)
    assert fast.fxopt.report["quantize_weights"].matched == 9


@dataclass(frozen=True)
class ALittleMore(QuantizeWeights):
    """Adds a hundredth to the scales of one weight, far less than rounding itself does."""

    def rewrite(self, program: Any, site: Any) -> None:
        super().rewrite(program, site)
        coded = program.facts.weights[-1]
        if "layers_1_self_attn_o_proj" in coded.name:
            getattr(program.gm, coded.parts[1]).mul_(1.01)


def test_a_quantiser_that_is_a_little_wrong_is_taken_back() -> None:
    """The check is as sharp as without: both sides have the same rounded weights."""
    with pytest.warns(UserWarning, match=r"with quantize_weights applied, .*goes on without it"):
        fast: Any = optimised(tiny("llama"), "int4", {"quantize_weights": ALittleMore("int4")}, verify="final")
    assert fast.fxopt.engine.facts.weights == ()
    assert fast.fxopt.report["quantize_weights"].dropped
    assert fast.fxopt.report.code_bytes == 0


def test_the_report_says_what_it_costs_and_saves() -> None:
    fast = optimised(tiny("llama"), "int8", verify="final")
    report = fast.fxopt.report
    exact, over, compiled = report.checks
    assert exact.note == ""
    for check in (over, compiled):
        assert check.note.startswith(
            "beside the stock model with weights of int8, which itself moves its rows by up to"
        )
        assert check.error < check.allowed < 1e-4  # in float32 as ever
    steps = {stage.name: stage.step for stage in report.stages}
    assert steps["quantize_weights"].weight_bytes < 0.4 * steps["last_logits"].weight_bytes
    assert 0.25 < report.code_bytes / report.coded_bytes < 0.3
    assert "of codes and scales are read, beside the stock model's own" in " ".join(str(report).split())


def test_beside_a_cache_of_fewer_bits() -> None:
    fast = optimised(tiny("llama"), "int4", {"quantize_kv": True}, verify="each", strict=True)
    (first, *_) = fast.fxopt.report.checks
    assert "with weights of int4 and int8 over a cache of int8, which itself moves" in first.note


# --- generating ----------------------------------------------------------------------------------

MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (prompt(), {}),
    "greedy, left-padded": (prompt(3, 23, padded=True), {}),
    "beams": (prompt(2, padded=True), {"num_beams": 3}),
}


def say_the_same(stock: Any, fast: Any, **others: Any) -> None:
    expected = rounded(stock, fast)
    for mode, (inputs, options) in MODES.items():
        options = {**GREEDY, **options, "max_new_tokens": 30}
        cache = {"past_key_values": rounding_cache(fast)} if fast.fxopt.engine.facts.formats else {}
        found = fast.generate(**inputs, **options)
        assert found.tolist() == expected.generate(**inputs, **options, **cache).tolist(), mode
    assert not [reason for reason in fast.fxopt.stats if reason.startswith("eager")]


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", {}, {}),
    "falcon": ("falcon", {}, {}),
    "mixtral": ("mixtral", {}, {}),
    "head as it is": ("llama", {"quantize_weights": {"dtype": "int4", "lm_head": None}}, {}),
    "head in int4, groups of 16": (
        "llama",
        {"quantize_weights": {"dtype": "int8", "lm_head": "int4", "group": 16}},
        {},
    ),
    "no fusions": ("llama", {"fuse_qkv": False, "fuse_gate_up": False}, {}),
    "no windows": ("gemma2", {"window_kv": False, "last_logits": False}, {}),
    "quantize_kv": ("llama", {"quantize_kv": {"kv_dtype": "int4"}}, {}),
    "layer": ("llama", {}, {**LAYERED, "max_batch": 6}),
    "whole": ("llama", {}, {"backend": "aot_eager", "compile": "whole", "verify": "final", "strict": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_stock_model_with_rounded_weights(way: str) -> None:
    family, passes, options = WAYS[way]
    stock = tiny(family)
    say_the_same(stock, optimised(stock, "int4", passes, **options))


def test_beside_a_cache_that_is_away(tmp_path: Any) -> None:
    stock, away = tiny("llama", layers=4), {"offload_kv": {"resident": 0.25, "folder": str(tmp_path)}}
    say_the_same(stock, optimised(stock, "int8", away, **LAYERED))


COMPILED: dict[str, tuple[WeightFormatName, dict[str, Any], dict[str, Any]]] = {
    "int8, whole": ("int8", {}, {"compile": "whole", "verify": "final", "strict": True}),
    "int4, layer": ("int4", {}, {"compile": "layer"}),
    "int4, everything": ("int4", {"quantize_kv": True, "plan_memory": True}, {"compile": "layer"}),
    "int8, matvec off": ("int8", {"matvec": False}, {"compile": "layer"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", COMPILED)
def test_compiled(way: str) -> None:
    name, passes, options = COMPILED[way]
    stock = tiny("llama")
    fast = optimised(stock, name, passes, backend="inductor", **options)
    say_the_same(stock, fast)
    assert all(proof.holds for proof in fast.fxopt.report.proofs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_compiled(name: WeightFormatName) -> None:
    fast = optimised(tiny("gpt2", torch.bfloat16), name, backend="inductor", verify="final", strict=True)
    decode = fast.fxopt.graphs["decode"]
    assert not [node for node in decode.graph.nodes if node.target is aten.linear.default]


def test_the_stock_model_stays_as_it_is() -> None:
    stock = tiny("llama")
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in stock.named_parameters()}
    optimised(stock, "int4", verify="final")
    for name, parameter in stock.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)


# --- saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: WeightFormatName, home: Any, tmp_path: Any) -> None:
    """No codes are saved: they are made of whatever weights the model has that is loaded on."""
    stock = tiny("llama")
    fast = optimised(stock, name)
    fast.fxopt.save(tmp_path / "saved")
    again: Any = fxopt.load(tmp_path / "saved", stock)
    assert torch.equal(again(**prompt()).logits, fast(**prompt()).logits)
    again.fxopt.save(tmp_path / "again")
    other = tiny("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    say_the_same(other, fxopt.load(tmp_path / "again", other))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "int2"}, "dtype should be one of"),
        ({"of": ["model.nothing"]}, "what the facts say of codes"),
        ({"name": "coded_other"}, "what the facts say of codes"),
    ],
)
def test_saved_codes_that_were_edited(change: dict[str, Any], words: str, home: Any, tmp_path: Any) -> None:
    stock = tiny("llama")
    optimised(stock, "int8").fxopt.save(tmp_path / "saved")
    edit(tmp_path / "saved", "manifest.json", lambda data: data["facts"]["weights"][0].update(change))
    with pytest.raises(ArtifactError, match=words):
        fxopt.load(tmp_path / "saved", stock, code="again")


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int2"}, ("dtype='int2'", "int8, int4")),
        ({"lm_head": True}, ("lm_head=True", "int8, int4")),
        ({"group": 64}, ("group=64", "one scale for each row")),
        ({"dtype": "int4", "group": 4}, ("group=4", "at least 8")),
        ({"dtype": "int4", "group": "row"}, ("group='row'", "no whole number")),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fxopt.optimize(tiny("llama"), 64, passes={"quantize_weights": options})
    assert_sentence(raised.value, *words)


def test_streamed_weights() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        optimised(tiny("llama", layers=4), "int8", {"offload_weights": True}, **LAYERED)
    assert_sentence(raised.value, "offload_weights", "quantize_weights", "leave one of the two out")


def test_rows_that_have_no_groups() -> None:
    outcome = optimised(tiny("llama", intermediate_size=92), "int4").fxopt.report["quantize_weights"]
    assert (outcome.matched, outcome.expected, len(outcome.refused)) == (7, 9, 2)
    assert "cannot be kept as int4: its rows have 92 numbers, whose halves have no groups" in outcome.refused[0].reason


def test_a_weight_that_is_computed() -> None:
    with edited(static()) as program:
        linear = next(node for node in program.graph.nodes if node.target is aten.linear.default)
        with program.graph.inserting_before(linear):
            twice = program.graph.call_function(aten.mul.Tensor, (linear.args[1], 2.0))
        linear.update_arg(1, twice)
    _, outcome = attempt(QuantizeWeights(), program)
    assert "is computed in the graph, so it cannot be rounded ahead of time" in outcome.refused[0].reason


def test_experts() -> None:
    outcome = optimised(tiny("mixtral"), "int8").fxopt.report["quantize_weights"]
    assert "the weights of experts stay as they are so far" in outcome.refused[0].reason


def test_weights_that_were_updated_in_place() -> None:
    stock = tiny("llama")
    fast = optimised(stock, "int8")
    with torch.no_grad():
        stock.model.norm.weight.mul_(1.1)
    assert torch.isfinite(fast(**prompt()).logits).all()
    with torch.no_grad():
        stock.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(InvalidRequestError) as raised:
        fast(**prompt())
    assert_sentence(
        raised.value, "model.layers.1.mlp.up_proj.weight", "updated in place", "optimize on the stock model"
    )
