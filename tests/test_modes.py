"""Every way of calling ``generate`` that Transformers has, beside the stock model: the same tokens.

A mode runs on the stock model and on the optimised one under the same seed, and ``fast.fxopt.stats`` says
which code served the second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from generation_modes import EAGER, FAST_LOOP, MODES, ON_THE_HUB
from packaging.version import Version
from ways_to_generate import CHUNK, GREEDY, MAX_LEN, TWO, Side, eager, lively, play, play_stock, slightly_off

import fxopt

FAMILIES = ["llama", "gemma2", "mixtral", "gpt2"]


@dataclass(frozen=True)
class Bench:
    family: str
    stock: Side
    fast: Side
    stats: Callable[[], Counter[str]]  # of the optimised model and its draft together


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> Bench:
    model, draft = lively(request.param), slightly_off(lively(request.param))
    options: dict[str, Any] = {"max_len": MAX_LEN, "backend": "eager", "chunk": CHUNK, "verify": "off"}
    fast: Any = fxopt.optimize(model, **options)
    fast_draft: Any = fxopt.optimize(draft, **options, passes="minimal")
    greedy = model.generate(**TWO, **GREEDY).tolist()
    return Bench(
        request.param,
        Side(model, draft, draft, greedy),
        Side(fast, draft, fast_draft, greedy),
        lambda: fast.fxopt.stats + fast_draft.fxopt.stats,
    )


GRAPHS = {"prefill", "decode", "score", "verify"}


@pytest.mark.parametrize("name", MODES)
def test_mode(bench: Bench, name: str, other_versions: str) -> None:
    mode = MODES[name]
    if reason := mode.unless.get(bench.family):
        pytest.skip(f"not for the stock {bench.family}: {reason}")
    if Version(transformers.__version__) < Version(mode.since):
        pytest.skip(f"the stock model does it since Transformers {mode.since}")
    expected = play_stock(mode, bench.stock, other_versions)
    before = bench.stats()
    found = play(mode, bench.fast)
    ran = bench.stats() - before

    assert found.exact == expected.exact
    torch.testing.assert_close(found.close, expected.close, atol=1e-3, rtol=1e-3)
    assert eager(ran) == mode.eager
    if name not in EAGER:
        assert GRAPHS & ran.keys()
        assert ("loop: fast" in ran) == (name in FAST_LOOP)
    if mode.bites:
        assert expected.exact[0] not in (bench.stock.greedy, bench.stock.greedy[:1])


@pytest.mark.parametrize("mode", ON_THE_HUB)
def test_modes_that_need_code_from_the_hub_say_so_as_in_the_stock_model(bench: Bench, mode: str) -> None:
    refusals = []
    for side in (bench.stock, bench.fast):
        with pytest.raises(ValueError, match="trust_remote_code=True") as refusal:
            side.model.generate(**TWO, **GREEDY | ON_THE_HUB[mode])
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]
