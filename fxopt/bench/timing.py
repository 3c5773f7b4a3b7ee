"""One generation, timed: the prompt, every step after it, and the whole."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fxopt.bench.contender import Contender, Tokens

Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True)
class Run:
    """Seconds of one generation, and what was said."""

    prefill: float  # until the first new token
    steps: tuple[float, ...]  # for each further one
    total: float
    tokens: Tokens
    read_speed: float | None = None  # of a plain read of memory in the same round, bytes per second


def timed(contender: Contender, prompt: Tensor, new: int, clock: Clock = time.perf_counter) -> Run:
    """Let a contender generate ``new`` tokens for each sequence of ``prompt`` [B, S]."""
    return (
        _on_gpu(contender, prompt, new, clock)
        if prompt.device.type == "cuda"
        else _on_cpu(contender, prompt, new, clock)
    )


def _on_cpu(contender: Contender, prompt: Tensor, new: int, clock: Clock) -> Run:
    """The host sees every token when it is there, so one generation tells everything."""
    stamps: list[float] = []
    began = clock()
    tokens = contender.generate(prompt, new, lambda: stamps.append(clock()))
    ended = clock()
    _check(tokens, prompt, new)
    steps = tuple(after - before for before, after in itertools.pairwise(stamps))
    return Run(stamps[0] - began, steps, ended - began, tokens)


def _on_gpu(contender: Contender, prompt: Tensor, new: int, clock: Clock) -> Run:
    """Looking at every token would make the host wait: two generations nobody looks at, of one token and of all."""

    def whole(count: int) -> tuple[float, Tokens]:
        torch.cuda.synchronize(prompt.device)
        began = clock()
        tokens = contender.generate(prompt, count, None)
        torch.cuda.synchronize(prompt.device)
        _check(tokens, prompt, count)
        return clock() - began, tokens

    first, _ = whole(1)
    total, tokens = whole(new)
    return Run(first, ((total - first) / (new - 1),), total, tokens)


def _check(tokens: Tokens, prompt: Tensor, new: int) -> None:
    lengths = [len(one) for one in tokens]
    if lengths != [new] * prompt.shape[0]:
        raise RuntimeError(f"{prompt.shape[0]} sequences of {new} new tokens were asked for, and {lengths} came")
