"""Models with rounded weights: the stock model's own code on weights as ``quantize_weights`` keeps them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

import fxopt
from fxopt.rounded_weights import own_name
from fxopt.weight_formats import WeightFormatName

CHUNK = 16
NAMES: tuple[WeightFormatName, ...] = ("int8", "int4")


def optimised(
    stock: PreTrainedModel, name: WeightFormatName, passes: dict[str, Any] | None = None, **options: Any
) -> Any:
    """With weights in this format, and nothing compiled or compared unless it is asked for."""
    passes = {"quantize_weights": {"dtype": name}} | (passes or {})
    return fxopt.optimize(
        stock, 100, **{"backend": "eager", "verify": "off", "chunk": CHUNK, "passes": passes, **options}
    )


def rounded(stock: PreTrainedModel, fast: Any) -> Any:
    """A copy of the stock model that has what the codes of ``fast`` stand for; what is tied to them stays as it was."""
    model = copy.deepcopy(stock)
    coded = fast.fxopt.engine.facts.weights
    assert coded
    for one in coded:
        for name in one.of:
            path, _, kind = own_name(name).rpartition(".")
            module = model.get_submodule(path)
            weight = getattr(module, kind)
            width = weight.shape[0 if one.turned else 1]
            value = one.decoded(one.encode([weight]), width, weight.dtype)
            setattr(module, kind, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    return model
