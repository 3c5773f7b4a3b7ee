"""One call of forward: what it asks of the graphs, or why only the model's own code can serve it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.cache import BufferCache
from fxopt.errors import InvalidRequestError

_EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")

#: Arguments of forward that ask for something the graphs compute.
_SERVED = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
    "cache_position",
    "tokenizer",  # of stop strings; generate hands it on, and forward has no use for it
}


@dataclass(frozen=True)
class Call:
    """What the graphs are to compute."""

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: BufferCache | None
    keep: int | Tensor
    return_dict: bool


def read_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
    """What a call asks for, or the reason why only the eager model can serve it."""
    given = dict(zip(model.fxopt.parameters, args, strict=False)) | kwargs
    obstacle = _obstacle_in_model(model) or _obstacle_in_options(model, given) or _obstacle_in_inputs(model, given)
    if obstacle is not None:
        return obstacle
    input_ids, cache = given["input_ids"], given.get("past_key_values")
    if cache is not None and cache.batch != input_ids.shape[0]:
        raise InvalidRequestError(
            f"a batch of {input_ids.shape[0]} was given with a cache for {cache.batch}; use a cache of its own"
        )
    return_dict, keep = given.get("return_dict"), given.get("logits_to_keep")
    return Call(
        input_ids,
        given.get("attention_mask"),
        given.get("position_ids"),
        cache,
        0 if keep is None else keep,
        model.config.return_dict if return_dict is None else return_dict,
    )


def depth_of(config: Any) -> Any:
    """How many layers run; a model that drafts for itself runs the first few for a while."""
    return getattr(config, "num_hidden_layers", None)


def _obstacle_in_model(model: Any) -> str | None:
    config = model.config
    if model.training:
        return "training mode"
    if torch.is_autocast_enabled(model.fxopt.engine.facts.device.type):
        return "autocast is on"
    if outputs := [name for name in _EXTRA_OUTPUTS if getattr(config, name, False)]:
        return f"the config asks for {', '.join(outputs)}"
    if model.fxopt.depth != depth_of(config):
        return "other layers than were captured"
    return None


def _obstacle_in_options(model: Any, given: dict[str, Any]) -> str | None:
    if extra := {name for name, value in given.items() if value is not None and value is not False} - _SERVED:
        return f"{', '.join(sorted(extra))} given"
    use_cache, cache = given.get("use_cache"), given.get("past_key_values")
    if not (model.config.use_cache if use_cache is None else use_cache):
        return "use_cache=False"
    if cache is not None and not (isinstance(cache, BufferCache) and cache.pool is model.fxopt.engine.pool):
        return f"a foreign cache ({type(cache).__name__})"
    return None


def _obstacle_in_inputs(model: Any, given: dict[str, Any]) -> str | None:
    facts, cache = model.fxopt.engine.facts, given.get("past_key_values")
    input_ids, mask, positions = given.get("input_ids"), given.get("attention_mask"), given.get("position_ids")
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        return "no input_ids of shape [batch, tokens]"
    if input_ids.device != facts.device:
        raise InvalidRequestError(
            f"input_ids is on {input_ids.device} but the model is on {facts.device}; move the inputs"
        )
    if cache is None and input_ids.shape[1] > facts.max_len:
        return "more tokens than max_len without a cache of ours"
    filled = cache.length if cache is not None else 0
    if mask is not None and tuple(mask.shape) != (input_ids.shape[0], filled + input_ids.shape[1]):
        return "an attention mask that is not [batch, past + tokens]"
    shapes = {(1, input_ids.shape[1]), tuple(input_ids.shape)}
    if positions is not None and tuple(positions.shape) not in shapes:
        return "positions that are not [batch, tokens]"
    if "position_ids" in model.fxopt.parameters and positions is None and mask is not None and not bool(mask.all()):
        return "a padded batch without position_ids, whose positions only the model's own code knows"
    return None
