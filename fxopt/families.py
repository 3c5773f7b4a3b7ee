"""Tiny random models of many architectures: two layers, grouped heads where the family has them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fxopt.errors import InvalidRequestError

VOCABULARY = 128
POSITIONS = 256
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_UNGROUPED = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GPT = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8}
SLIDING = 24

#: Every architecture that the project promises, with what makes it tiny.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": SLIDING},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": SLIDING, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **_LLAMA,
        "head_dim": 16,
        "sliding_window": SLIDING,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {k: v for k, v in _GPT.items() if k != "rotary_dim"},
    "gpt_neo": {
        **_TOKENS,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": SLIDING,
        "max_position_embeddings": POSITIONS,
    },
    "gpt_neox": _UNGROUPED,
    "opt": {
        **_TOKENS,
        "hidden_size": 64,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    },
    "phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {**_LLAMA, "sliding_window": SLIDING},
    "falcon": {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "gptj": _GPT,
    "stablelm": _LLAMA,
    "cohere": _LLAMA,
    "cohere2": {
        **_LLAMA,
        "sliding_window": SLIDING,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": _LLAMA,
    "starcoder2": {**_LLAMA, "sliding_window": SLIDING},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "smollm3": _LLAMA,
    "granite": _LLAMA,
}


def tiny(family: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of one family, the same weights every time. ``layers`` is even."""
    if family not in FAMILIES:
        raise InvalidRequestError(f"there is no tiny {family!r}; there are {', '.join(FAMILIES)}")
    config = AutoConfig.for_model(family, **{**_deep(FAMILIES[family], layers), **overrides})
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Spread out, so that the greedy token is not decided by the last bit.
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    assert isinstance(model, PreTrainedModel)
    return model


def _deep(settings: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same with more layers, which each family counts under a name of its own."""
    names = ("num_hidden_layers", "n_layer", "num_layers")
    found: dict[str, Any] = {name: layers for name in names if name in settings}
    if "layer_types" in settings:
        found["layer_types"] = settings["layer_types"] * (layers // 2)
    if "attention_types" in settings:
        found["attention_types"] = [[kinds, layers // 2] for kinds, _ in settings["attention_types"]]
    return settings | found
