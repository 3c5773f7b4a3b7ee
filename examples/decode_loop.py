"""What ``generate`` adds to the compiled graphs: its loop, beside the bare steps and Transformers' loop.

    python examples/decode_loop.py

All on the same graphs, in one process, interleaved; medians, and the ratio to the bare steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from transformers import StoppingCriteria

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import tiny
from fxopt.program import CACHE_POSITION, INPUT_IDS, POSITION_IDS, whole_windows


class Never(StoppingCriteria):
    """A criterion of the user's own: with one, the loop of Transformers runs."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def bare_steps(fast: Any, prompt: torch.Tensor, new: int) -> None:
    """The prompt through the prefill graph, then ``new`` times the decode graph, and nothing else."""
    engine, filled = fast.fxopt.engine, prompt.shape[1]
    cache = engine.new_cache(1)
    cache.record_mask(None, filled + new)
    engine.step(cache, prompt, torch.arange(filled)[None], keep=1)
    decode = engine.lowered(engine.decode_role(1))
    row, position = torch.tensor([filled]), torch.full((1, 1), filled)
    fed = {INPUT_IDS: prompt[:, -1:], POSITION_IDS: position, CACHE_POSITION: row}
    windows = sorted({whole_windows(filled + step + 1) for step in range(new)})
    calls = {window: decode.bound(engine.arguments(cache, decode, window) | fed) for window in windows}
    for step in range(new):
        row.fill_(filled + step)
        position.fill_(filled + step)
        calls[whole_windows(filled + step + 1)]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model instead of SmolLM2-135M")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=1200)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    torch.set_num_threads(2)
    dtype = getattr(torch, options.dtype)
    model: Any = tiny("llama", dtype) if options.tiny else load_model("demo", dtype)[0]
    fast: Any = fxopt.optimize(model, options.max_len, backend=options.backend)
    prompt = torch.randint(3, model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))

    def generate(**settings: Any) -> None:
        settings |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = fast.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.new, **settings)
        assert found.shape[1] == options.prompt + options.new

    contenders: dict[str, Callable[[], None]] = {
        "bare steps": torch.no_grad()(lambda: bare_steps(fast, prompt, options.new)),
        "generate": generate,
        "generate, Transformers' loop": lambda: generate(stopping_criteria=[Never()]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + options.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if turn:  # the first is to warm up
                seconds[name].append(time.perf_counter() - began)
    bare = seconds["bare steps"]
    rows = [
        [
            name,
            f"{statistics.median(times):.3f}",
            f"{statistics.median(one / other for one, other in zip(times, bare, strict=True)):.3f}",
        ]
        for name, times in seconds.items()
    ]
    print(tabulate(rows, headers=["", "seconds", "to the bare steps"], disable_numparse=True))
    loops = {what: count for what, count in fast.fxopt.stats.items() if "loop" in what}
    print(f"loops that ran: {loops}")


if __name__ == "__main__":
    main()
