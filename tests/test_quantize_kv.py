"""Caches of fewer bits: what a format may be off by, what the graphs say over one, and what cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from edited_programs import attempt, edited, static
from sentences import assert_sentence
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import fxopt
from fxopt.cache import BufferSet
from fxopt.errors import InvalidRequestError
from fxopt.families import FAMILIES, VOCABULARY, tiny
from fxopt.kv_formats import FORMATS, FormatName, KVFormat, hadamard
from fxopt.passes.quantize_kv import QuantizeKV
from fxopt.program import Facts, KVShape, Program, Rows
from fxopt.testing import check_pass

aten = torch.ops.aten
NAMES: tuple[FormatName, ...] = ("int8", "fp8", "int4")
CPU = torch.device("cpu")
MAX_LEN = 300  # past 128 and 256 rows
CHUNK = 16
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


# --- formats -------------------------------------------------------------------------------------

#: The largest error of a number: in codes of the row's largest, and of the number itself.
BOUNDS: dict[FormatName, tuple[float, float]] = {
    "int8": (0.5 / 127 * (1 + 2**-7), 0.0),
    "fp8": (2.0**-10 / 448 * (1 + 2**-7), 2.0**-4),
}


def rows_of(width: int, kind: int, name: FormatName, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows("key_0", 2, width, dtype, CPU, FORMATS[name][kind])


def samples(width: int) -> dict[str, Tensor]:
    noise = torch.randn(2, 2, 33, width, generator=torch.Generator().manual_seed(width))
    outlier = noise.clone()
    outlier[..., 3] += 40.0
    return {
        "noise": noise,
        "one large": outlier,
        "of one sign": noise.abs() + 5.0,
        "tiny": 1e-4 * noise,
        "huge": 200.0 * noise,
        "zeros": torch.zeros_like(noise),
    }


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("width", [16, 64, 80])
def test_no_number_is_off_by_more_than_the_format_says(name: FormatName, width: int) -> None:
    of_row, of_number = BOUNDS[name]
    kept = rows_of(width, 0, name)
    for kind, rows in samples(width).items():
        found = kept.decode(kept.encode(rows))
        allowed = of_row * rows.abs().amax(-1, keepdim=True) + of_number * rows.abs()
        assert bool(((found - rows).abs() <= allowed + 1e-30).all()), kind


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_no_row_is_off_by_more_than_int4_says(width: int, kind: int) -> None:
    """By length, since rows are turned: half a step for each number, and what is cut off at the ends of a group."""
    kept = rows_of(width, kind, "int4")
    members = width // 2 // kept.buffers[1].width
    for name, rows in samples(width).items():
        error = (kept.decode(kept.encode(rows)) - rows).norm(dim=-1)
        largest = kept.turned(rows).unflatten(-1, (-1, members)).abs().amax(-1)
        scale = largest.amax(-1, keepdim=True) / 7.65 * (1 + 2**-3) + 2.0**-24  # of the row, rounded up
        step = largest / 7.65 + scale / 16  # a group may have half a share too many, and has one at least
        cut = (largest - 7.5 * (largest / 7.65 - scale / 32)).clamp(min=0)
        allowed = ((0.5 * step).maximum(cut).square() * members).sum(-1).sqrt()
        assert bool((error <= allowed * 1.001).all()), name
        if name == "noise":
            assert float((error / rows.norm(dim=-1)).mean()) < 0.1


def test_one_large_number_does_not_cost_the_others_theirs() -> None:
    """What the turning is for."""
    rows, kept = samples(64)["one large"], rows_of(64, 0, "int4")
    found = kept.decode(kept.encode(rows))
    scale = rows.abs().amax(-1, keepdim=True) / 7
    plain = (rows / scale).round() * scale
    assert float((found - rows).norm()) < 0.6 * float((plain - rows).norm())


@pytest.mark.parametrize("size", [8, 16, 64])
def test_turned_twice_is_as_before(size: int) -> None:
    torch.testing.assert_close(hadamard(size) @ hadamard(size), torch.eye(size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_buffer_of_zeros_is_read_as_zeros(name: FormatName) -> None:
    """Rows that nobody has written are masked, and must be numbers all the same."""
    for kind in (0, 1):
        kept = rows_of(64, kind, name)
        parts = [torch.zeros(buffer.shape(1, 5), dtype=buffer.dtype) for buffer in kept.buffers]
        assert float(kept.decode(parts).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_rows_come_back_in_the_dtype_of_the_model(name: FormatName, dtype: torch.dtype) -> None:
    kept, rows = rows_of(64, 0, name, dtype), samples(64)["noise"].to(dtype)
    found = kept.decode(kept.encode(rows))
    assert found.dtype is dtype
    assert float((found.float() - rows.float()).norm() / rows.float().norm()) < 0.1


@pytest.mark.parametrize(("name", "most"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.28)])
@pytest.mark.parametrize("width", [64, 128])
def test_bytes(name: FormatName, most: float, width: int) -> None:
    """Beside bfloat16, scales included; and what is counted is what is allocated."""
    shape = KVShape(3, width, 3, width, name, name)
    facts = Facts((shape,) * 2, 128, 100, torch.float32, CPU, 0, 0, 0, tuple)
    half = replace(facts, layers=(KVShape(3, width, 3, width),) * 2, dtype=torch.bfloat16)
    sets = [BufferSet(one, 2) for one in (facts, half)]
    kept, plain = (sum(tensor.nbytes for tensor in one.tensors.values()) for one in sets)
    assert kept <= most * plain
    assert all(one.nbytes - one.mask.nbytes == nbytes for one, nbytes in zip(sets, (kept, plain), strict=True))


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


class Rounding(DynamicLayer):
    """A layer of Transformers' own cache that keeps what the format makes of each row."""

    def __init__(self, kept: tuple[Rows, Rows]) -> None:
        super().__init__()
        self.kept = kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.kept
        states = key.decode(key.encode(key_states)), value.decode(value.encode(value_states))
        found: tuple[Tensor, Tensor] = super().update(*states, *args, **kwargs)
        return found


def rounding_cache(fast: Any) -> DynamicCache:
    facts = fast.fxopt.engine.facts
    cache = DynamicCache()
    cache.layers = [Rounding(facts.rows(layer)) for layer in range(len(facts.layers))]
    return cache


def optimised(stock: PreTrainedModel, name: FormatName, **options: Any) -> Any:
    return fxopt.optimize(
        stock, 100, passes=chosen(name), **{"backend": "eager", "verify": "off", "chunk": CHUNK, **options}
    )


def chosen(name: FormatName) -> dict[str, Any]:
    return {"quantize_kv": {"kv_dtype": name}}


def prompt(batch: int = 1, length: int = 21, padded: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    for row in range(1, batch if padded else 0):
        mask[row, : row * length // batch] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


MODES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "greedy": (prompt(), {}),
    "greedy, left-padded": (prompt(3, padded=True), {}),
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
    stock = tiny("llama")
    fast, greedy = optimised(stock, name), {**GREEDY, "max_new_tokens": 30}
    expected = fast.generate(**prompt(), **greedy).tolist()
    assert fast.generate(**prompt(), **greedy, assistant_model=tiny("llama", num_hidden_layers=1)).tolist() == expected
    assert fast.generate(**prompt(), **greedy, prompt_lookup_num_tokens=3).tolist() == expected
    assert fast.fxopt.stats["verify"] + fast.fxopt.stats["score"] > 0


Edit = Callable[[Any], None]
EDITS: dict[str, tuple[Edit, int]] = {
    "repeated and selected": (
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([3, 0, 1]))),  # type: ignore[dict-item]
        3,
    ),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), 2),
    "cropped": (lambda cache: cache.crop(-4), 2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", NAMES)
def test_every_buffer_follows(name: FormatName, edit: str) -> None:
    stock = tiny("llama")
    fast = optimised(stock, name)
    change, batch = EDITS[edit]
    said = []
    for model, cache in ((stock, rounding_cache(fast)), (fast, fast.fxopt.engine.new_cache(2))):
        model(**prompt(2), past_key_values=cache, use_cache=True)
        change(cache)
        length = cache.get_seq_length() + 1
        tokens, mask = torch.arange(5, 5 + batch)[:, None], torch.ones(batch, length, dtype=torch.long)
        said.append(model(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_own_code_reads_such_a_cache(name: FormatName) -> None:
    """A call that asks for attentions goes on from rows that the graphs have written, and writes its own."""
    stock = tiny("llama")
    fast = optimised(stock, name)
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
    stock = tiny("llama")
    fast = optimised(stock, name)
    fast.fxopt.save(tmp_path / "saved")
    again: Any = fxopt.load(tmp_path / "saved", stock, expected={"passes": chosen(name)})
    assert again.fxopt.engine.facts.formats == (name,)
    assert torch.equal(again(**prompt()).logits, fast(**prompt()).logits)


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


def test_formats_are_formats() -> None:
    for pair in FORMATS.values():
        for one in pair:
            format: KVFormat = one  # what mypy checks
            assert format.parts(64)[0].suffix == ""
