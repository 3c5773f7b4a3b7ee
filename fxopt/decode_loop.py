"""The loop of ``generate`` for the common case: greedy or sampled, nothing asked for but tokens.

Transformers prepares a dictionary of inputs for every token, grows mask, positions and tokens by
``cat``, and asks the device after each token whether all sequences have ended. Here a token goes
straight back into the decode graph, whatever grows has its place from the start, and the question
is asked every few tokens where asking makes the host wait. What was decoded too far is taken back.

The tokens are those of the stock loop: the same processors in the same order, the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from fxopt.cache import BufferCache
from fxopt.engine import Engine

LOOK_EVERY = 8  # tokens between two looks at a device that runs on its own

#: Inputs of generate that prefill uses, and decoding does not or knows by itself.
_KNOWN_INPUTS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "inputs_embeds",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
    }
)
_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill")


def obstacle(
    model: Any, criteria: StoppingCriteriaList, config: Any, inputs: Mapping[str, Any], synced: bool
) -> str | None:
    """Why Transformers' own loop has to run, as the words behind "its own loop because"; None if this one can."""
    cache = inputs.get("past_key_values")
    strange = sorted(name for name in inputs if inputs[name] is not None and name not in _KNOWN_INPUTS)
    others = [type(c).__name__ for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    extras = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    asked = [name for name in extras if config.return_dict_in_generate and getattr(config, name, False)]
    replaced = [name for name in _METHODS if _is_replaced(model, name)]
    reasons = {
        "several processes run in step": synced,
        "of a foreign cache": not isinstance(cache, BufferCache),
        f"{', '.join(others)} is to stop it": others,
        f"{', '.join(asked)} was asked for": asked,
        f"{', '.join(strange)} was given": strange,
        f"the model has its own {', '.join(replaced)}": replaced,
        "the model has forward hooks": model._forward_hooks or model._forward_pre_hooks,
        "no length was set": criteria.max_length is None,
        "the model is in training mode": model.training,
        "autocast is on": torch.is_autocast_enabled(model.fxopt.engine.facts.device.type),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_replaced(model: Any, name: str) -> bool:
    return getattr(type(model), name, None) is not getattr(GenerationMixin, name, None)


@dataclass
class _Ends:
    """Which sequences go on, and what follows those that do not."""

    eos: Tensor | None
    pad: Tensor | None
    unfinished: Tensor  # [B]

    def __call__(self, tokens: Tensor) -> Tensor:
        """``tokens`` [B] with padding for sequences that have ended; notes those that end with them."""
        if self.eos is None:
            return tokens
        assert self.pad is not None
        tokens = tokens * self.unfinished + self.pad * (1 - self.unfinished)
        self.unfinished = self.unfinished & ~torch.isin(tokens, self.eos)
        return tokens

    def all(self) -> bool:
        """Waits for the device."""
        return self.eos is not None and int(self.unfinished.max()) == 0


def decode(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: StoppingCriteriaList,
    config: Any,
    streamer: Any,
    inputs: dict[str, Any],
) -> Any:
    """What ``GenerationMixin._sample`` returns, for a call without an :func:`obstacle`."""
    engine: Engine = model.fxopt.engine
    cache: BufferCache = inputs["past_key_values"]
    batch, length = input_ids.shape
    longest = int(criteria.max_length)
    sequences = input_ids.new_zeros((batch, max(longest, length + 1)))
    sequences[:, :length] = input_ids
    eos = [one.eos_token_id for one in criteria if isinstance(one, EosTokenCriteria)]
    pad = config._pad_token_tensor
    ends = _Ends(
        torch.cat([one.to(input_ids.device) for one in eos]) if eos else None,
        pad.to(input_ids.device) if pad is not None else None,
        torch.ones(batch, dtype=torch.long, device=input_ids.device),
    )
    draws = _Draws(config.do_sample, input_ids.device)
    free = _asking_is_free(engine.facts.device, streamer)
    outputs = model._prefill(input_ids, config, inputs, is_first_iteration=not config.is_assistant)
    inputs = model._update_model_kwargs_for_generation(outputs, inputs)
    logits, decoding = outputs.logits, None
    while True:
        scores = logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        tokens = ends(draws(processors(sequences[:, :length].contiguous(), scores)))
        sequences[:, length] = tokens
        length += 1
        if streamer is not None:
            streamer.put(tokens.cpu())
        if length >= longest or ((free or (longest - length) % LOOK_EVERY == 0) and ends.all()):
            break
        if decoding is None:
            cache.record_mask(inputs.get("attention_mask"), 1)
            decoding = engine.decoding(cache, _positions(inputs, cache))
        else:
            cache.mask[:, cache.length] = 1
        logits = decoding(tokens[:, None])
    if not free:
        length = _trim(sequences, input_ids.shape[1], length, ends, cache, draws)
    if streamer is not None:
        streamer.end()
    sequences = sequences[:, :length]
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
    return sequences


def _asking_is_free(device: torch.device, streamer: Any) -> bool:
    """Whether nobody waits when the host looks at a token; a streamer makes it look anyway."""
    return device.type == "cpu" or streamer is not None


def _positions(inputs: Mapping[str, Any], cache: BufferCache) -> Tensor:
    """The positions [B, 1] of the first decoded token."""
    known = inputs.get("position_ids")
    if known is not None:
        return known[:, -1:].expand(cache.batch, 1)  # type: ignore[no-any-return]
    return torch.full((cache.batch, 1), cache.length, device=cache.mask.device)


class _Draws:
    """Picks tokens as the stock loop does, and remembers where the random numbers stood after each."""

    def __init__(self, sample: bool, device: torch.device) -> None:
        self._sample = sample
        self._generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        self._offsets: list[int] = []

    def __call__(self, scores: Tensor) -> Tensor:
        """Tokens [B] for scores [B, V]."""
        if not self._sample:
            return scores.argmax(dim=-1)
        tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        if self._generator is not None:
            self._offsets.append(self._generator.get_offset())
        return tokens

    def take_back(self, kept: int) -> None:
        """As if only ``kept`` tokens had been drawn."""
        if self._generator is not None and 0 < kept < len(self._offsets):
            self._generator.set_offset(self._offsets[kept - 1])


def _trim(sequences: Tensor, start: int, length: int, ends: _Ends, cache: BufferCache, draws: _Draws) -> int:
    """Take back what was decoded after the last sequence had ended; returns the length that is left."""
    if ends.eos is None:
        return length
    new = sequences[:, start:length]
    ended = torch.isin(new, ends.eos)
    steps = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, length - start)
    kept = int(steps.max())
    extra = length - start - kept
    if extra > 0:
        cache.crop(-extra)
        draws.take_back(kept)
    return start + kept
