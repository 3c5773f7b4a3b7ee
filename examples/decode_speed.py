"""Decode speed side by side: stock eager, StaticCache + torch.compile, fxopt; one process, interleaved.

    python examples/decode_speed.py --dtype bfloat16 --max-len 1200

Every round runs each contender once; what is printed is the median over all steps of all rounds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tabulate import tabulate
from transformers import DynamicCache, StaticCache

import fxopt
from fxopt.demo_model import load_model

Run = tuple[list[float], list[int]]  # seconds of each step, tokens
Contender = Callable[[], Run]


def steps(forward: Callable[..., Any], cache: Any, first: torch.Tensor, count: int, start: int) -> Run:
    """Greedy decoding, one timed forward per token."""
    seconds, tokens, token = [], [], first
    for position in range(start, start + count):
        positions = torch.full((first.shape[0], 1), position)
        began = time.perf_counter()
        logits = forward(token, past_key_values=cache, position_ids=positions).logits
        token = logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - began)
        tokens.append(int(token[0]))
    return seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=1200)
    parser.add_argument("--prompt", type=int, default=200, help="tokens in the cache before the timed steps")
    parser.add_argument("--new", type=int, default=24, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--compile", nargs="+", default=["auto"], choices=("auto", "layer", "whole"))
    parser.add_argument("--kv-dtype", nargs="+", default=["full"], choices=("full", "int8", "fp8", "int4"))
    parser.add_argument("--no-static", action="store_true", help="leave StaticCache + torch.compile out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = load_model(options.model, getattr(torch, options.dtype))
    prompt = torch.randint(3, model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))

    def stock() -> Run:
        cache = DynamicCache()
        first = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        return steps(model, cache, first, options.new, options.prompt)

    def ours(fast: Any) -> Run:
        output = fast(prompt, logits_to_keep=1)
        return steps(fast, output.past_key_values, output.logits[:, -1:].argmax(-1), options.new, options.prompt)

    static_cache = StaticCache(config=model.config, max_cache_len=options.max_len)
    compiled = torch.compile(model.forward)

    def static() -> Run:
        static_cache.reset()
        first = model(prompt, past_key_values=static_cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        return steps(compiled, static_cache, first, options.new, options.prompt)

    contenders: dict[str, Contender] = {"stock eager": stock}
    if not options.no_static:
        contenders["StaticCache + torch.compile"] = static
    began = time.perf_counter()
    for how, kept in itertools.product(options.compile, options.kv_dtype):
        passes = None if kept == "full" else {"quantize_kv": {"kv_dtype": kept}}
        fast = fxopt.optimize(model, max_len=options.max_len, passes=passes, backend=options.backend, compile=how)
        special = [word for word, usual in ((how, "auto"), (kept, "full")) if word != usual]
        contenders[", ".join(["fxopt", *special])] = functools.partial(ours, fast)
    optimise_seconds = time.perf_counter() - began

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        tokens = {name: run()[1] for name, run in contenders.items()}  # warm up, compile
        for _ in range(options.rounds):
            for name, run in contenders.items():
                seconds[name] += run()[0]

    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        [
            name,
            f"{1e3 * median[name]:.2f}",
            f"{1 / median[name]:.1f}",
            f"{median['stock eager'] / median[name]:.2f}x",
            f"{median['StaticCache + torch.compile'] / median[name]:.2f}x" if not options.no_static else "",
            "yes" if tokens[name] == tokens["stock eager"] else "no",
        ]
        for name in contenders
    ]
    print(
        f"{options.model}, {options.dtype}, batch 1, prompt {options.prompt}, max_len {options.max_len}, "
        f"{options.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}; fxopt.optimize took {optimise_seconds:.0f} s"
    )
    print(tabulate(rows, headers=["", "ms/token", "tokens/s", "to stock", "to StaticCache", "same tokens"]))


if __name__ == "__main__":
    main()
