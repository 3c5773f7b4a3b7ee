"""Shapes of known models, for random weights: speed and memory do not depend on what the weights are."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from fxopt.errors import InvalidRequestError

_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

#: A model type of Transformers, and what makes it that model.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-1b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "llama-7b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "llama-13b": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "max_position_embeddings": 4096,
        },
    ),
}


def known_config(name: str) -> PretrainedConfig:
    if name not in CONFIGS:
        raise InvalidRequestError(
            f"there is no config {name!r}; there are {', '.join(CONFIGS)}, or give --model FOLDER"
        )
    kind, numbers = CONFIGS[name]
    return AutoConfig.for_model(kind, **_ENDS, **numbers)


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with another depth; kinds of layers that alternate go on as they began."""
    deeper = type(config).from_dict(config.to_dict())
    deeper.num_hidden_layers = layers
    kinds = getattr(config, "layer_types", None)
    if kinds:
        deeper.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
    return deeper
