"""Many calls of one optimised model, in a row and side by side: the same tokens, and nothing is compiled twice."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from ways_to_generate import CHUNK, GREEDY, MAX_LEN, SAMPLED, WITH_CACHE, eager, lively, prompts

import fxopt


def compiled(stats: Mapping[str, int]) -> dict[str, int]:
    return {key: count for key, count in stats.items() if key.startswith("compiled ")}


@dataclass(frozen=True)
class Session:
    """A stock model and the compiled one, for many calls in a row or side by side."""

    stock: Any
    fast: Any


@pytest.fixture(scope="module")
def session() -> Session:
    stock = lively("llama")
    return Session(stock, fxopt.optimize(stock, max_len=MAX_LEN, backend="aot_eager", chunk=CHUNK, verify="off"))


def test_two_threads_say_what_one_says(session: Session) -> None:
    dice, start = random.Random(3), threading.Barrier(2)
    batches = [[prompts(dice.randint(1, 3), dice.randint(1, 24), 50 * k + i) for i in range(50)] for k in range(2)]

    def say(model: Any, prompts: list[Tensor]) -> list[Any]:
        return [model.generate(prompt, **GREEDY | {"max_new_tokens": 6}).tolist() for prompt in prompts]

    def say_together(prompts: list[Tensor]) -> list[Any]:
        start.wait(timeout=60)  # so that both need the same graphs first
        return say(session.fast, prompts)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(say_together, batches))
    assert found == [say(session.stock, prompts) for prompts in batches]
    assert eager(session.fast.fxopt.stats) == {}


@dataclass(frozen=True)
class Spoken:
    """One call of a long session, for ``batch`` sequences in all."""

    kind: str
    batch: int
    tokens: int
    new: int

    def by(self, model: Any) -> Any:
        ids = prompts(self.batch, self.tokens, seed=self.new)
        torch.manual_seed(self.tokens)
        return KINDS[self.kind](model, ids, GREEDY | {"max_new_tokens": self.new}).tolist()


@torch.no_grad()
def logits_of_all(model: Any, ids: Tensor, options: Any) -> Tensor:
    likeliest: Tensor = model(ids).logits.argmax(-1)
    return likeliest


def left_padded(model: Any, ids: Tensor, options: Any) -> Any:
    mask = torch.ones_like(ids)
    mask[-1, : ids.shape[1] // 2] = 0
    return model.generate(ids, attention_mask=mask, **options)


def another_turn(model: Any, ids: Tensor, options: Any) -> Any:
    first = model.generate(ids, **options, **WITH_CACHE)
    return model.generate(torch.cat([first.sequences, ids], 1), past_key_values=first.past_key_values, **options)


KINDS: dict[str, Callable[[Any, Tensor, dict[str, Any]], Any]] = {
    "greedy": lambda model, ids, options: model.generate(ids, **options),
    "left-padded": left_padded,
    "sampling": lambda model, ids, options: model.generate(ids, **options | SAMPLED),
    "samples": lambda model, ids, options: model.generate(ids[:1], **options | SAMPLED, num_return_sequences=len(ids)),
    "beams": lambda model, ids, options: model.generate(ids[:1], **options, num_beams=len(ids)),
    "prompt lookup": lambda model, ids, options: model.generate(ids[:1], **options, prompt_lookup_num_tokens=3),
    "logits of all": logits_of_all,
    "another turn": another_turn,
}


def test_sixty_calls_compile_nothing(session: Session) -> None:
    """After each kind of call at each batch size nothing is compiled, and Dynamo never has a part in it."""
    dice, stats = random.Random(7), session.fast.fxopt.stats
    for batch in range(1, 5):
        for kind in KINDS:
            Spoken(kind, batch, tokens=CHUNK + 2, new=3).by(session.fast)
    before = compiled(stats)
    assert before
    counters.clear()
    calls = [
        Spoken(dice.choice(list(KINDS)), dice.randint(1, 4), dice.randint(1, 30), dice.randint(1, 12))
        for _ in range(60)
    ]
    for call in calls:
        assert call.by(session.fast) == call.by(session.stock), call
    assert compiled(stats) == before
    assert eager(stats) == {}
    assert not any(counters.values()), counters

    torch.compile(torch.neg, backend="eager")(torch.ones(1))
    assert counters["frames"]["total"] == 1  # which is where Dynamo would have been seen
