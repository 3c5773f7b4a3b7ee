"""The pass ``quantize_kv``: what graphs and ``generate`` say over a cache of fewer bits, and what cannot be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from edited_programs import attempt, edited, static
from rounded_caches import CHUNK, GREEDY, NAMES, chosen, llama, optimised, prompt, rounding_cache
from saved_models import edit
from sentences import assert_sentence
from torch import Tensor

import fxopt
from fxopt import ArtifactError
from fxopt.errors import InvalidRequestError
from fxopt.families import FAMILIES, tiny
from fxopt.kv_formats import FormatName
from fxopt.passes.quantize_kv import QuantizeKV
from fxopt.program import Program
from fxopt.testing import check_pass

aten = torch.ops.aten
MAX_LEN = 300  # past 128 and 256 rows


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "families"), [("fp8", ["llama", "gemma2", "gpt2"]), ("int4", FAMILIES)])
def test_every_family(name: FormatName, families: Iterable[str]) -> None:
    """For int8 see test_passes.py, from which fp8 differs in nothing but its codes."""
    check_pass(QuantizeKV(name), families)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: FormatName) -> None:
    """Codes are turned over by a rounding of bfloat16, in ours and not in theirs."""
    fast: Any = optimised(tiny("llama", torch.bfloat16), name, verify="each", strict=True)
    assert fast.fxopt.report["quantize_kv"].matched == 4


def test_no_turn_in_the_window_where_the_query_can_be_turned() -> None:
    """Four products with the matrix in a layer: new K, new V, the query, and what attention says."""
    for family in ("llama", "gemma2", "bloom", "gptj"):
        fast: Any = optimised(tiny(family), "int4")
        program = fast.fxopt.symbolic
        window = str(program.placeholders()["attention_mask"].meta["val"].shape[1])
        turns = [node for node in program.graph.nodes if str(node.target).startswith("kv_turn")]
        assert len(turns) == 4 * 2, family
        for node in turns:
            (product,) = node.users
            assert window not in map(str, product.meta["val"].shape), (family, product)


@dataclass(frozen=True)
class HalfTheScale(QuantizeKV):
    """Writes V as it should, and K with scales that are half of what the codes were made with."""

    def rewrite(self, program: Program, site: Any) -> None:
        super().rewrite(program, site)
        if site.is_key:
            write = next(iter(program.placeholders()[f"{site.rows.name}_scale"].users))
            with program.graph.inserting_before(write):
                half = program.graph.call_function(aten.mul.Scalar, (write.args[3], 0.5))
            write.update_arg(3, half)


@pytest.mark.parametrize("verify", ["each", "final"])
def test_a_quantiser_that_is_wrong_is_taken_back(verify: Any) -> None:
    with pytest.warns(UserWarning, match=r"with quantize_kv applied, K of layer 0.*same format.*goes on without it"):
        fast: Any = fxopt.optimize(
            tiny("llama"), 100, passes={"quantize_kv": HalfTheScale()}, backend="eager", verify=verify
        )
    assert fast.fxopt.engine.facts.formats == ()
    assert fast.fxopt.report["quantize_kv"].dropped


def test_the_report_says_what_the_format_costs() -> None:
    fast: Any = optimised(tiny("llama"), "int8", verify="final")
    exact, over, compiled = fast.fxopt.report.checks
    assert exact.note == ""
    assert exact.error < 1e-5
    for check in (over, compiled):
        assert "the stock model over a cache of int8, which itself moves its rows by up to 1." in check.note
        assert check.error < check.allowed
    assert "over a cache of int8" in " ".join(str(fast.fxopt.report).split())
    steps = {stage.name: stage.step for stage in fast.fxopt.report.stages}
    assert steps["quantize_kv"].kv_read_bytes < 0.3 * steps["last_logits"].kv_read_bytes  # of float32


# --- generating ----------------------------------------------------------------------------------

MODES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "greedy": (prompt(), {}),
    "greedy, left-padded": (prompt(3, 23, padded=True), {}),
    "beams": (prompt(2, padded=True), {"num_beams": 3}),
    "several beams": (prompt(), {"num_beams": 3, "num_return_sequences": 2}),
    "scores": (prompt(), {"output_scores": True}),
}


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "llama") for name in NAMES), ("int4", "gemma2"), ("int4", "gpt2"), ("int4", "bloom")]
)
def test_tokens_are_those_of_the_stock_model_over_such_a_cache(name: FormatName, family: str) -> None:
    stock = tiny(family)
    fast = optimised(stock, name)
    for mode, (inputs, options) in MODES.items():
        options = {**GREEDY, **options, "max_new_tokens": 40, "return_dict_in_generate": True}
        expected = stock.generate(**inputs, **options, past_key_values=rounding_cache(fast))
        assert fast.generate(**inputs, **options).sequences.tolist() == expected.sequences.tolist(), mode
    assert not [reason for reason in fast.fxopt.stats if reason.startswith("eager")]


@pytest.mark.parametrize("name", NAMES)
def test_drafts_are_taken_back(name: FormatName) -> None:
    """Assisted decoding and prompt lookup crop the cache, and say what greedy decoding says."""
    _, fast = llama(name)
    greedy = {**GREEDY, "max_new_tokens": 30}
    expected = fast.generate(**prompt(), **greedy).tolist()
    assert fast.generate(**prompt(), **greedy, assistant_model=tiny("llama", num_hidden_layers=1)).tolist() == expected
    assert fast.generate(**prompt(), **greedy, prompt_lookup_num_tokens=3).tolist() == expected
    assert fast.fxopt.stats["verify"] + fast.fxopt.stats["score"] > 0


def repeated_and_selected(cache: Any) -> Any:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    return cache


def reordered(cache: Any) -> Any:
    cache.reorder_cache(torch.tensor([1, 1]))
    return cache


def cropped(cache: Any) -> Any:
    cache.crop(-4)
    return cache


@pytest.mark.parametrize("change", [repeated_and_selected, reordered, cropped, copy.deepcopy])
@pytest.mark.parametrize("name", NAMES)
def test_every_buffer_follows(name: FormatName, change: Callable[[Any], Any]) -> None:
    stock, fast = llama(name)
    said = []
    for model, cache in ((stock, rounding_cache(fast)), (fast, fast.fxopt.engine.new_cache(2))):
        model(**prompt(2), past_key_values=cache, use_cache=True)
        changed = change(cache)
        batch, length = changed.layers[0].keys.shape[0], changed.get_seq_length() + 1
        tokens, mask = torch.arange(5, 5 + batch)[:, None], torch.ones(batch, length, dtype=torch.long)
        said.append(model(input_ids=tokens, attention_mask=mask, past_key_values=changed).logits)
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_own_code_reads_such_a_cache(name: FormatName) -> None:
    """A call that asks for attentions goes on from rows that the graphs have written, and writes its own."""
    stock, fast = llama(name)
    said = []
    for model, cache in ((stock, rounding_cache(fast)), (fast, fast.fxopt.engine.new_cache(2))):
        model(**prompt(2), past_key_values=cache, use_cache=True)
        for position in (21, 22):
            mask = torch.ones(2, position + 1, dtype=torch.long)
            tokens = torch.full((2, 1), 7)
            found = model(tokens, attention_mask=mask, past_key_values=cache, output_hidden_states=position == 21)
        said.append(found.logits)
    assert any(reason.startswith("eager") for reason in fast.fxopt.stats)
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled(name: FormatName) -> None:
    """Over windows of 64, 128, 256 rows and more: the right tokens, every write in place, no cache copied."""
    stock = tiny("llama", num_hidden_layers=1, max_position_embeddings=512)
    fast: Any = fxopt.optimize(stock, MAX_LEN, passes=chosen(name), chunk=CHUNK, strict=True)
    buffers = fast.fxopt.engine.facts.buffers()
    for role, proof in fast.fxopt.report.proofs.items():
        assert proof.holds, (role, proof)
        assert proof.writes == len(buffers) == (6 if name == "int4" else 4)
    options = {**GREEDY, "max_length": MAX_LEN}
    expected = stock.generate(**prompt(), **options, past_key_values=rounding_cache(fast))
    assert fast.generate(**prompt(), **options).tolist() == expected.tolist()


# --- saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name: FormatName, home: Any, tmp_path: Any) -> None:
    stock, fast = llama(name)
    fast.fxopt.save(tmp_path / "saved")
    again: Any = fxopt.load(tmp_path / "saved", stock, expected={"passes": chosen(name)})
    assert again.fxopt.engine.facts.formats == (name,)
    assert torch.equal(again(**prompt()).logits, fast(**prompt()).logits)


@pytest.mark.parametrize(
    ("format", "words"), [("int2", "key_format should be one of"), ("int4", "a buffer of"), (None, "a buffer of")]
)
def test_a_saved_format_that_was_edited(format: str | None, words: str, home: Any, tmp_path: Any) -> None:
    stock, fast = llama("int8")
    fast.fxopt.save(tmp_path / "saved")
    edit(tmp_path / "saved", "manifest.json", lambda data: data["facts"]["layers"][1].update(key_format=format))
    with pytest.raises(ArtifactError, match=words):
        fxopt.load(tmp_path / "saved", stock, code="again")


# --- what cannot be ------------------------------------------------------------------------------


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fxopt.optimize(tiny("llama"), 64, passes={"quantize_kv": {"kv_dtype": "int2"}})
    assert_sentence(raised.value, "kv_dtype='int2'", "int8, fp8, int4")


def test_rows_that_have_no_groups() -> None:
    """Heads of 12 numbers: int4 leaves them alone and says so, int8 does not mind."""
    stock = tiny("llama", head_dim=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = optimised(stock, "int4", verify="final")
    outcome = fast.fxopt.report["quantize_kv"]
    assert (outcome.matched, outcome.expected, len(outcome.refused)) == (0, 4, 4)
    assert outcome.refused[0].reason == (
        "key_0 cannot be kept as int4: its rows have 12 numbers, which is no multiple of 8; use int8"
    )
    assert fast.fxopt.engine.facts.formats == ()
    assert optimised(stock, "int8", verify="final").fxopt.engine.facts.formats == ("int8",)


def test_a_buffer_that_something_else_reads() -> None:
    with edited(static()) as program:
        buffer = program.placeholders()["key_0"]
        with program.graph.inserting_before(program.output()):
            other = program.graph.call_function(aten.sum.default, (buffer,))
            logits = program.logits()
            changed = program.graph.call_function(aten.add.Tensor, (logits, other))
        program.output().args = ((changed,),)
    result, outcome = attempt(QuantizeKV(), program)
    assert outcome.matched == 1  # V may go on
    assert "key_0 is also read by sum_default, which would find codes there" in outcome.refused[0].reason
    assert result.facts.layers[0].key_format is None
    assert result.facts.layers[0].value_format == "int8"
