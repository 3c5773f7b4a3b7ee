"""Does a rewritten graph compute what the stock model computes? Logits and cache contents.

The same random prompt goes through both: a prefill, then single tokens, with a batch of two whose
second row is padded on the left. Logits of real tokens and cached rows of real tokens must agree.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fxopt.engine import Engine, Limits, capacity_for
from fxopt.lower import lower
from fxopt.program import Program
from fxopt.report import Check

#: How much of its length a row may differ by, in roundings of the dtype. Sums in another order differ
#: by tens of roundings in float32; models compute rotary tables in float32 also when they are float64.
#: In half precision the stock model rounds after every op and compiled code does not: SmolLM2 in
#: bfloat16 differs by 11 roundings, of which 9 are the stock model's own distance from float32.
ALLOWED = {
    torch.float64: 1e3 * torch.finfo(torch.float32).eps,
    torch.float32: 1e3 * torch.finfo(torch.float32).eps,
    torch.float16: 32 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 32 * torch.finfo(torch.bfloat16).eps,
}

DECODE_STEPS = 4
LONGEST_PROMPT = 80  # past the first window of 64 rows


SMALL_CHUNK = 16  # so that the prompt crosses chunk borders


def judge_for(model: PreTrainedModel, max_len: int) -> Callable[[Program], tuple[Check, str | None]]:
    """A judge of symbolic programs, with buffers just large enough and a padded batch."""
    expected = reference(model, batch=2, max_len=max_len)

    def judge(program: Program) -> tuple[Check, str | None]:
        graph = lower(program, "eager")
        facts = replace(program.facts, capacity=capacity_for(expected.tokens.shape[1]))
        engine = Engine(facts, lambda role: graph, Limits(SMALL_CHUNK, max_batch=2))
        return compare(expected, engine, "the graphs, in eager mode")

    return judge


def check_engine(model: PreTrainedModel, engine: Engine, what: str) -> tuple[Check, str | None]:
    """Judge an engine at the batch size it was compiled for."""
    expected = reference(model, batch=engine.limits.max_batch or 1, max_len=engine.facts.max_len)
    return compare(expected, engine, what)


@dataclass(frozen=True)
class Reference:
    """What the stock model said to one prompt."""

    tokens: Tensor  # [B, T + DECODE_STEPS]
    mask: Tensor
    positions: Tensor
    prompt: int
    logits: tuple[Tensor, ...]  # the last position's, after the prefill and after each decode step
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@torch.no_grad()
def reference(model: PreTrainedModel, *, batch: int, max_len: int) -> Reference:
    """Run the stock model on a random prompt."""
    generator = torch.Generator().manual_seed(0)
    steps = min(DECODE_STEPS, max_len - 1)
    prompt = max(1, min(LONGEST_PROMPT, max_len - steps))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    shape = (batch, prompt + steps)
    tokens = torch.randint(0, vocabulary, shape, generator=generator).to(model.device)
    mask = torch.ones(shape, dtype=torch.long, device=model.device)
    mask[1:, : prompt // 3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    logits = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + steps))]:
        inputs: dict[str, Any] = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end]}
        optional = {"position_ids": positions[:, start:end], "logits_to_keep": 1}
        inputs |= {name: value for name, value in optional.items() if name in _forward_parameters(model)}
        logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1])
    keys = tuple(layer.keys for layer in cache.layers)
    values = tuple(layer.values for layer in cache.layers)
    return Reference(tokens, mask, positions, prompt, tuple(logits), keys, values)


@torch.no_grad()
def compare(expected: Reference, engine: Engine, what: str) -> tuple[Check, str | None]:
    """Feed the same tokens; the worst relative error, and a sentence if it is too large."""
    cache = engine.new_cache(expected.tokens.shape[0])
    worst, where = 0.0, ""

    def note(found: Tensor, wanted: Tensor, label: str) -> None:
        nonlocal worst, where
        error = relative_error(found, wanted)
        if error > worst or error != error:
            worst, where = error, label

    borders = [0, expected.prompt, *range(expected.prompt + 1, expected.tokens.shape[1] + 1)]
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        cache.record_mask(expected.mask[:, :end], end - start)
        tokens, positions = expected.tokens[:, start:end], expected.positions[:, start:end]
        logits = engine.step(cache, tokens, positions, last_only=True)
        note(
            logits[:, -1], expected.logits[index], "logits of the prefill" if index == 0 else f"logits of step {index}"
        )
    real = expected.mask.bool()
    for layer, (key, value) in enumerate(zip(expected.keys, expected.values, strict=True)):
        rows = key.shape[2]  # a sliding layer of the stock cache may have kept fewer
        seen = real[:, -rows:]
        for kind, ours, stock in (("K", cache.buffers.keys[layer], key), ("V", cache.buffers.values[layer], value)):
            last = ours[:, :, cache.length - rows : cache.length]
            note(last.transpose(1, 2)[seen], stock.transpose(1, 2)[seen], f"{kind} of layer {layer}")
    allowed = ALLOWED[expected.logits[0].dtype]
    check = Check(what, worst, allowed)
    if worst <= allowed:
        return check, None
    return check, f"{where} differ from the stock model's by {worst:.1e} of their length, and {allowed:.1e} is allowed"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The worst row's difference, as a share of that row's length (or of the mean row's, if longer).

    Row by row, so that one wrong row among many is seen, and by length, so that the rounding of a
    single small entry is not taken for one.
    """
    if wanted.numel() == 0:
        return 0.0
    found, wanted = found.double(), wanted.double()
    if bool((found.isfinite() != wanted.isfinite()).any()):
        return float("inf")
    difference = (found - wanted).nan_to_num().norm(dim=-1)
    length = wanted.nan_to_num().norm(dim=-1)
    return float((difference / length.clamp(min=max(float(length.mean()), 1e-9))).max())


def _forward_parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
