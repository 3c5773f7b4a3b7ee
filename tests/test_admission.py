"""Requests that cannot be served: a sentence with the numbers and names in it, before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import fxopt
from fxopt.admission import PRESETS, select
from fxopt.errors import FxoptError, InvalidRequestError
from fxopt.families import POSITIONS, tiny
from fxopt.passes import PASSES
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.passes.rotary import Rotary
from fxopt.program import Program
from fxopt.rewrite import Located, Pass, Stage

NAMES = [kind.name for kind in PASSES]
REQUIRED = [kind.name for kind in PASSES if kind.required]
OPTIONAL = [kind.name for kind in PASSES if not kind.required]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for a second thread takes longer than the work of a tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be started for a request that is refused."""
    monkeypatch.setattr("fxopt.request.capture", lambda *_, **__: pytest.fail("the capture was reached"))
    monkeypatch.setattr("fxopt.api.Progress", lambda *_: pytest.fail("work was begun"))


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", num_hidden_layers=1)


def assert_sentence(error: BaseException, *words: str) -> None:
    """A ValueError with one line that holds these words."""
    text = str(error)
    assert isinstance(error, FxoptError)
    assert isinstance(error, ValueError)
    assert "\n" not in text
    for word in words:
        assert word in text, text


# --- numbers and choices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_len": 0}, ["max_len=0", "at least 2"]),
        ({"max_len": 1}, ["max_len=1", "at least 2"]),
        ({"max_len": -3}, ["max_len=-3", "at least 2"]),
        ({"max_len": "x"}, ["max_len='x'", "no whole number"]),
        ({"max_len": None}, ["max_len=None", "no whole number"]),
        ({"max_len": 32.0}, ["max_len=32.0", "no whole number"]),
        ({"max_len": True}, ["max_len=True", "no whole number"]),
        ({"max_len": POSITIONS + 1}, [f"max_len={POSITIONS + 1}", f"{POSITIONS} positions", "LlamaForCausalLM"]),
        ({"chunk": 1}, ["chunk=1", "at least 2"]),
        ({"chunk": 0}, ["chunk=0", "at least 2"]),
        ({"chunk": 2.5}, ["chunk=2.5", "no whole number"]),
        ({"max_batch": 0}, ["max_batch=0", "at least 1"]),
        ({"max_batch": -1}, ["max_batch=-1", "at least 1"]),
        ({"max_batch": False}, ["max_batch=False", "no whole number"]),
        ({"max_batch": "2"}, ["max_batch='2'", "no whole number"]),
        ({"backend": "induktor"}, ["backend='induktor'", "inductor, aot_eager, eager", "Did you mean 'inductor'?"]),
        ({"backend": None}, ["backend=None", "inductor, aot_eager, eager"]),
        ({"verify": "finale"}, ["verify='finale'", "final, each, off", "Did you mean 'final'?"]),
        ({"verify": True}, ["verify=True", "final, each, off"]),
        ({"passes": "defalt"}, ["no preset named 'defalt'", "did you mean default?"]),
        ({"passes": ["fuse_kqv"]}, ["no pass named 'fuse_kqv'", "did you mean fuse_qkv"]),
        ({"passes": {"static_kv": False}}, ["static_kv cannot be left out"]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_work")
def test_bad_options(llama: Any, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fxopt.optimize(llama, **{"max_len": 32, **options})
    assert_sentence(raised.value, *words)


def test_the_longest_request_is_admitted(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit itself is allowed: this comes as far as the capture."""

    class Reached(Exception):  # noqa: N818 - a signal
        pass

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise Reached

    monkeypatch.setattr("fxopt.request.capture", reached)
    requests: list[dict[str, Any]] = [
        {"max_len": POSITIONS},
        {"max_len": 2},
        {"max_len": 2, "chunk": 2, "max_batch": 1},
    ]
    for options in requests:
        with pytest.raises(Reached):
            fxopt.optimize(llama, **options)


# --- models --------------------------------------------------------------------------------------


def small_config() -> Any:
    return copy.deepcopy(tiny("llama", num_hidden_layers=1).config)


def not_a_model() -> Any:
    return nn.Linear(2, 2)


def a_name() -> Any:
    return "HuggingFaceTB/SmolLM2-135M"


def encoder_decoder() -> Any:
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **tokens)
    return T5ForConditionalGeneration(config).eval()


def no_head() -> Any:
    return AutoModel.from_config(small_config()).eval()


def encoder() -> Any:
    config = AutoConfig.for_model(
        "bert", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return AutoModel.from_config(config).eval()


def training() -> Any:
    return tiny("llama", num_hidden_layers=1).train()


def on_meta() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(small_config()).eval()


def on_two_devices() -> Any:
    model: Any = tiny("llama", num_hidden_layers=1)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    return model


def int8() -> Any:
    model: Any = tiny("llama", num_hidden_layers=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


def packed_buffer() -> Any:
    """Weights in a buffer, as quantisers leave them, with the flag that from_pretrained sets."""
    model: Any = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    model.is_quantized = True
    return model


def hooked() -> Any:
    model: Any = tiny("llama", num_hidden_layers=1)
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output)
    return model


def hooked_before() -> Any:
    model: Any = tiny("llama", num_hidden_layers=1)
    model.register_forward_pre_hook(lambda module, inputs: None)
    return model


def dispatched() -> Any:
    """What accelerate leaves on a module that it moves about."""
    model: Any = tiny("llama", num_hidden_layers=1)
    model.model.norm._hf_hook = object()
    return model


def peft_object() -> Any:
    return SimpleNamespace(peft_config={})


def peft_class() -> Any:
    return type("PeftModelForCausalLM", (), {})()


def with_adapters() -> Any:
    model: Any = tiny("llama", num_hidden_layers=1)
    model.peft_config = {"default": object()}
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (not_a_model, ["Linear", "causal LM (PreTrainedModel) is needed"]),
        (a_name, ["a str was given", "PreTrainedModel"]),
        (encoder_decoder, ["T5ForConditionalGeneration", "no decoder-only causal LM"]),
        (no_head, ["LlamaModel", "no decoder-only causal LM", "AutoModelForCausalLM"]),
        (encoder, ["BertModel", "no decoder-only causal LM"]),
        (training, ["LlamaForCausalLM", "training mode", "model.eval()"]),
        (on_meta, ["meta device", "no values"]),
        (on_two_devices, ["cpu and meta", "one device"]),
        (int8, ["LlamaForCausalLM is quantised", "layers.0.mlp.up_proj.weight is torch.int8"]),
        (packed_buffer, ["LlamaForCausalLM is quantised", "layers.0.mlp.qweight"]),
        (hooked, ["model.layers.0.mlp has forward hooks"]),
        (hooked_before, ["LlamaForCausalLM has forward hooks"]),
        (dispatched, ["model.norm has forward hooks"]),
        (peft_object, ["SimpleNamespace carries PEFT adapters", "merge_and_unload"]),
        (peft_class, ["PeftModelForCausalLM carries PEFT adapters", "merge_and_unload"]),
        (with_adapters, ["LlamaForCausalLM carries PEFT adapters", "merge_and_unload"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.usefixtures("no_work")
def test_models_that_are_not_served(make: Callable[[], Any], words: list[str]) -> None:
    model = make()
    with pytest.raises(InvalidRequestError) as raised:
        fxopt.optimize(model, 32)
    assert_sentence(raised.value, *words)


def test_a_flag_alone_does_not_make_a_model_quantised() -> None:
    """De-quantised checkpoints keep it; what counts is what the weights are."""
    model: Any = tiny("llama", num_hidden_layers=1)
    model.is_quantized = True
    fast: Any = fxopt.optimize(model, 32, backend="eager", passes="minimal", verify="off")
    assert fast(torch.tensor([[3]])).logits.shape == (1, 1, model.config.vocab_size)


# --- selections ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mine(Pass[Located]):
    """A user's own pass, with an option."""

    name = "mine"
    summary = "does nothing"
    stage = Stage.SYMBOLIC
    strength: int = 1

    def find(self, program: Program) -> Iterator[Located]:
        yield from ()


def names(selection: Any) -> list[str]:
    return [rewriter.name for rewriter in select(selection)]


def without(*left_out: str) -> list[str]:
    return [name for name in NAMES if name not in left_out]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, NAMES),
        ("default", NAMES),
        ("minimal", REQUIRED),
        ({}, NAMES),
        ({"fuse_qkv": False}, without("fuse_qkv")),
        ({"fuse_qkv": False, "rotary": True, "matvec": False}, without("fuse_qkv", "matvec")),
        ({"rotary": {}}, NAMES),
        ({"rotary": Rotary()}, NAMES),
        ([], REQUIRED),
        (["rotary", "fuse_qkv"], [*REQUIRED, "fuse_qkv", "rotary"]),
        (("static_kv", "rotary", "rotary"), [*REQUIRED, "rotary"]),
        ([FuseQKV], [*REQUIRED, "fuse_qkv"]),
        ([FuseQKV()], [*REQUIRED, "fuse_qkv"]),
        ([Mine(), "rotary"], [*REQUIRED, "rotary", "mine"]),
        ([Mine], [*REQUIRED, "mine"]),
        ((name for name in NAMES), NAMES),
        (PASSES, NAMES),
    ],
)
def test_selections(selection: Any, expected: list[str]) -> None:
    """Always in pipeline order, required ones always there, a user's own last."""
    assert names(selection) == expected


def test_every_optional_pass_can_be_left_out() -> None:
    assert names({name: False for name in OPTIONAL}) == REQUIRED
    assert set(PRESETS) == {"default", "minimal"}


def test_objects_are_taken_as_they_are() -> None:
    own, rotary = Mine(strength=3), Rotary()
    selected = {rewriter.name: rewriter for rewriter in select([own, rotary])}
    assert selected["mine"] is own
    assert selected["rotary"] is rotary
    assert next(rewriter for rewriter in select({"rotary": rotary}) if rewriter.name == "rotary") is rotary


def test_options_reach_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.admission.catalogue", lambda: (*PASSES, Mine))
    mine = {rewriter.name: rewriter for rewriter in select({"mine": {"strength": 5}})}["mine"]
    assert mine == Mine(strength=5)
    with pytest.raises(InvalidRequestError) as raised:
        select({"mine": {"strenght": 5}})
    assert_sentence(raised.value, "mine does not take these options", "'strenght'")


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("minimum", ["no preset named 'minimum'", "did you mean minimal?"]),
        ("zzz", ["no preset named 'zzz'", "there are default, minimal"]),
        (["rotery"], ["no pass named 'rotery'", "did you mean rotary?"]),
        (["fuse"], ["no pass named 'fuse'"]),
        (["zzz"], ["no pass named 'zzz'", *NAMES]),
        ({"window": False}, ["no pass named 'window'", "window_kv"]),
        ({3: False}, ["no pass named 3", *NAMES]),
        ({"static_kv": False}, ["static_kv cannot be left out", *OPTIONAL]),
        ({"remove_control_flow": False}, ["remove_control_flow cannot be left out"]),
        ({"rotary": None}, ["passes['rotary'] is None", "True, False, options or a pass object"]),
        ({"rotary": 1}, ["passes['rotary'] is 1", "True, False, options or a pass object"]),
        ({"rotary": {"speed": 1}}, ["rotary does not take these options", "'speed'"]),
        ([7], ["7 is no pass", "a name, a pass class or a pass object"]),
        ([nn.Linear], ["is no pass"]),
    ],
    ids=str,
)
def test_bad_selections(selection: Any, words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        select(selection)
    assert_sentence(raised.value, *words)


# --- while it runs -------------------------------------------------------------------------------

MAX_LEN = 24


@pytest.fixture(scope="module")
def fast(llama: Any) -> Any:
    return fxopt.optimize(llama, MAX_LEN, backend="eager", max_batch=2, chunk=8)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.full((batch, length), 5)


@pytest.mark.usefixtures("no_work")
def test_an_optimised_model_is_not_optimised_again(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fxopt.optimize(fast, 32)
    assert_sentence(raised.value, "LlamaForCausalLM is optimised already", "stock model")


def test_a_prompt_and_answer_beyond_max_len(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(1, 10), max_new_tokens=MAX_LEN - 10 + 1, do_sample=False)
    assert_sentence(raised.value, "prompt of 10 tokens", "15 new", "make 25", "max_len is 24")
    assert fast.generate(tokens(1, 10), max_new_tokens=MAX_LEN - 10, do_sample=False).shape[1] <= MAX_LEN


def test_a_prompt_alone_beyond_max_len(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(1, 40), max_new_tokens=5, do_sample=False)
    assert_sentence(raised.value, "prompt of 40 tokens", "5 new", "make 45", "max_len is 24")


@pytest.mark.parametrize(
    ("batch", "options"), [(3, {}), (1, {"num_beams": 3}), (2, {"num_return_sequences": 2, "do_sample": True})]
)
def test_a_batch_beyond_max_batch(fast: Any, batch: int, options: dict[str, Any]) -> None:
    """Beams and several answers count: each has rows of its own in the cache."""
    copies = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(batch, 4), **{"max_new_tokens": 4, "do_sample": False, **options})
    assert_sentence(raised.value, f"a batch of {batch * copies} sequences", "max_batch is 2")


def test_a_batch_beyond_max_batch_in_forward(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(3, 4))
    assert_sentence(raised.value, "a batch of 3 sequences", "max_batch is 2")


def test_a_cache_that_is_full(llama: Any, fast: Any) -> None:
    """The call that does not fit says both numbers and leaves the cache usable."""
    held = fast(tokens(1, 20)).past_key_values
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(1, 5), past_key_values=held)
    assert_sentence(raised.value, "the cache holds 20 tokens", "5 more", "max_len is 24")
    logits = fast(tokens(1, 4), past_key_values=held).logits
    torch.testing.assert_close(logits, llama(tokens(1, 24)).logits[:, -4:], atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidRequestError, match=r"holds 24 tokens and 1 more .* max_len is 24"):
        fast(tokens(1, 1), past_key_values=held)


def test_a_cache_that_is_full_on_the_eager_path(fast: Any) -> None:
    """Calls that the graphs do not serve fill the same buffers, and stop at the same row."""
    held = fast(tokens(1, 20)).past_key_values
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(1, 5), past_key_values=held, output_attentions=True)
    assert_sentence(raised.value, "the cache holds 20 of 24 tokens", "5 more")


def test_inputs_on_another_device(fast: Any) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        fast(tokens(1, 4).to("meta"))
    assert_sentence(raised.value, "input_ids is on meta", "the model is on cpu")


def test_weights_that_have_moved() -> None:
    """Refused at the next prefill, by name; the stock model goes on, and can be optimised anew."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    fast: Any = fxopt.optimize(stock, MAX_LEN, backend="eager", passes="minimal", verify="off")
    fast.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    stock.to(torch.float64)
    with pytest.raises(InvalidRequestError) as raised:
        fast.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    assert_sentence(raised.value, "weight has moved since fxopt.optimize", "model.to(...)", "again")
    with pytest.raises(InvalidRequestError, match="has moved"):
        fast(tokens(1, 4))
    expected = stock.generate(tokens(1, 4), max_new_tokens=4, do_sample=False)
    again: Any = fxopt.optimize(stock, MAX_LEN, backend="eager", passes="minimal", verify="off")
    assert torch.equal(again.generate(tokens(1, 4), max_new_tokens=4, do_sample=False), expected)


def test_weights_updated_in_place_are_seen() -> None:
    """Packed weights too: nothing has moved."""
    stock: Any = tiny("llama", num_hidden_layers=1)
    fast: Any = fxopt.optimize(stock, MAX_LEN, backend="eager", verify="off")
    with torch.no_grad():
        stock.model.layers[0].self_attn.k_proj.weight.mul_(-0.5)
        stock.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    torch.testing.assert_close(fast(tokens(1, 6)).logits, stock(tokens(1, 6)).logits, atol=1e-4, rtol=1e-4)
