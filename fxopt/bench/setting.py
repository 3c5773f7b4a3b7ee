"""A size of job, and the settings that lists of sizes make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.errors import InvalidRequestError


@dataclass(frozen=True)
class Setting:
    """So many sequences, with a prompt of so many tokens each and so many new ones, in caches of ``max_len``."""

    batch: int
    prompt: int
    new: int
    max_len: int
    layers: int | None = None  # None: as many as the model has

    def __str__(self) -> str:
        depth = "" if self.layers is None else f"{self.layers} layers, "
        sequences = f"batch {self.batch}, prompt {self.prompt}, {self.new} new tokens"
        return f"{depth}{sequences}, max_len {self.max_len}"


def settings(
    batches: Sequence[int], prompts: Sequence[int], news: Sequence[int], max_len: int | None = None
) -> list[Setting]:
    """Every combination; the cache is by default as long as the longest of them needs."""
    needed = max(prompts) + max(news)
    if max_len is not None and max_len < needed:
        raise InvalidRequestError(
            f"a prompt of {max(prompts)} tokens and {max(news)} new ones make {needed}, but max_len is {max_len}; "
            "ask for fewer tokens or a larger max_len"
        )
    if min(news) < 2:
        raise InvalidRequestError("1 new token was asked for, which the prompt gives already; ask for 2 or more")
    combined = itertools.product(batches, prompts, news)
    return [Setting(batch, prompt, new, max_len or needed) for batch, prompt, new in combined]
