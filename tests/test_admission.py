"""Requests that cannot be served: a sentence with the numbers and names in it, before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sentences import assert_sentence
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import fxopt
from fxopt.errors import InvalidRequestError
from fxopt.families import POSITIONS, tiny


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", num_hidden_layers=1)


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
