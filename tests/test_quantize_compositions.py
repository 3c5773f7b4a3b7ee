"""``quantize_kv`` beside everything else that can be asked for: the tokens of the stock model over such a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rounded_caches import GREEDY, optimised, prompt, rounding_cache

import fxopt
from fxopt import ArtifactError
from fxopt.families import tiny
from fxopt.kv_formats import FormatName


@dataclass(frozen=True)
class Way:
    """What is asked for beside a cache of fewer bits."""

    passes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    layers: int = 2

    def optimised(self, format: FormatName, folder: Path) -> tuple[Any, Any]:
        """The stock model and the fast one; what is streamed goes to ``folder``."""
        stock, passes = tiny(self.family, layers=self.layers), dict(self.passes)
        for name in {"offload_weights", "offload_kv"} & passes.keys():
            passes[name] = {"resident": 0.25, "folder": str(folder)}
        fast = optimised(stock, format, passes, **self.options)
        outcome = fast.fxopt.report["quantize_kv"]
        assert outcome.matched == outcome.expected == 2 * self.layers
        return stock, fast


STRICT: dict[str, Any] = {"verify": "final", "strict": True}
LAYERED: dict[str, Any] = {"backend": "aot_eager", "compile": "layer"}
OTHERS = ("fuse_qkv", "fuse_gate_up", "rotary", "last_logits", "window_kv", "grouped_attention")
WAYS: dict[str, Way] = {
    "alone": Way(options={"verify": "each", "strict": True}),
    "fuse_qkv off": Way({"fuse_qkv": False}),
    "window_kv off": Way({"window_kv": False}),
    "grouped_attention off": Way({"grouped_attention": False}),
    "all others off": Way(dict.fromkeys(OTHERS, False), family="gemma2"),
}
IN_PIECES: dict[str, Way] = {
    "whole": Way(options={"backend": "aot_eager", "compile": "whole", "max_batch": 3, **STRICT}),
    "layer": Way(options={**LAYERED, "max_batch": 3}),
    "layer, mixtral": Way(options=LAYERED, family="mixtral"),
    "offload_weights": Way({"offload_weights": True}, LAYERED, layers=4),
    "offload_kv": Way({"offload_kv": True}, LAYERED, layers=4),
    "offload_kv, window_kv off": Way({"offload_kv": True, "window_kv": False}, LAYERED, layers=4),
    "offload_kv, offload_weights": Way({"offload_kv": True, "offload_weights": True}, LAYERED, layers=4),
}
COMPILED: dict[str, Way] = {
    "whole": Way(options={"compile": "whole", "max_batch": 3, **STRICT}),
    "layer": Way(options={"compile": "layer"}),
    "decode_attention off": Way({"decode_attention": False}),
    "window_kv off": Way({"window_kv": False}),
    "grouped_attention off": Way({"grouped_attention": False}),
    "plan_memory": Way({"plan_memory": True}, {"max_batch": 3, **STRICT}),
    "plan_memory and both offloads": Way(
        {"plan_memory": True, "offload_weights": True, "offload_kv": True}, {"compile": "layer"}, layers=4
    ),
}
BOTH: tuple[FormatName, ...] = ("int8", "int4")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BOTH)
def test_tokens(name: FormatName, way: str, tmp_path: Path) -> None:
    say_the_same(*WAYS[way].optimised(name, tmp_path))


@pytest.mark.parametrize("way", IN_PIECES)
def test_tokens_of_pieces(way: str, tmp_path: Path) -> None:
    say_the_same(*IN_PIECES[way].optimised("int4", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [*(("int4", way) for way in COMPILED), ("int8", "whole"), ("fp8", "layer")])
def test_tokens_of_compiled_code(name: FormatName, way: str, tmp_path: Path) -> None:
    one = COMPILED[way]
    with_inductor = Way(one.passes, {"backend": "inductor", **one.options}, one.family, one.layers)
    stock, fast = with_inductor.optimised(name, tmp_path)
    say_the_same(stock, fast)
    for proof in fast.fxopt.report.proofs.values():
        assert proof.holds or "grouped_attention" in one.passes  # without it heads are written out
        assert proof.writes == len(fast.fxopt.engine.facts.buffers())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("int8", "whole"), ("int4", "layer")])
def test_half_precision_compiled(name: FormatName, how: str) -> None:
    """Tokens of bfloat16 part where a rounding turns a code over; the judge knows how far."""
    fast = optimised(tiny("llama", torch.bfloat16), name, backend="inductor", compile=how, max_batch=3, **STRICT)
    assert fast.fxopt.engine.facts.formats == (name,)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "passes"), [("whole", {}), ("layer", {}), ("whole", {"plan_memory": True})])
def test_saved_code(how: str, passes: dict[str, Any], home: Path, tmp_path: Path) -> None:
    stock = tiny("llama")
    optimised(stock, "int4", passes, backend="inductor", compile=how).fxopt.save(tmp_path / "saved")
    say_the_same(stock, fxopt.load(tmp_path / "saved", stock))


def test_what_is_streamed_is_not_saved(tmp_path: Path) -> None:
    _, fast = IN_PIECES["offload_weights"].optimised("int8", tmp_path)
    with pytest.raises(ArtifactError, match="cannot be saved yet; leave offload_weights out"):
        fast.fxopt.save(tmp_path / "saved")


def say_the_same(stock: Any, fast: Any) -> None:
    """One sequence, and three that are padded."""
    options = {**GREEDY, "max_new_tokens": 24}
    for inputs in (prompt(), prompt(3, 23, padded=True)):
        expected = stock.generate(**inputs, **options, past_key_values=rounding_cache(fast))
        assert fast.generate(**inputs, **options).tolist() == expected.tolist()
    assert not [reason for reason in fast.fxopt.stats if reason.startswith("eager")]
