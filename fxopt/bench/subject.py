"""The model that a benchmark is about, and what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxopt.bench.setting import Setting
from fxopt.bench.source import Source
from fxopt.bench.traffic import Traffic

FIRST_TOKEN = 3  # those before it open, close and fill up sequences


@dataclass(frozen=True)
class Subject:
    """One stock model, with the longest cache and the largest batch that any of its settings needs."""

    source: Source
    model: Any
    tokenizer: Any  # None where weights are random
    max_len: int
    max_batch: int

    @cached_property
    def traffic(self) -> Traffic:
        return Traffic.of(self.model)

    def prompt(self, setting: Setting) -> Tensor:
        """Token ids [B, S], the same ones every time; a longer prompt begins as a shorter one."""
        vocabulary = self.model.config.get_text_config().vocab_size
        drawn = torch.Generator().manual_seed(0)
        rows = [torch.randint(FIRST_TOKEN, vocabulary, (self.max_len,), generator=drawn) for _ in range(setting.batch)]
        return torch.stack(rows)[:, : setting.prompt].contiguous().to(self.source.device)

    def texts(self, prompt: Tensor, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Prompts and what followed, decoded; without a tokenizer the numbers."""
        whole = [[*before, *after] for before, after in zip(prompt.tolist(), tokens, strict=True)]
        if self.tokenizer is None:
            return [" ".join(map(str, one)) for one in whole]
        return [str(text) for text in self.tokenizer.batch_decode(whole)]
