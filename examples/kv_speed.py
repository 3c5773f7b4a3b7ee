"""How long steps take with caches, or weights, of fewer bits; they take turns, so that all feel the machine's moods.

    python examples/kv_speed.py --filled 1000 8000
    python examples/kv_speed.py --filled 200 --max-len 512 --formats weights-int8 weights-int4

Rows are filled in name only: what they hold makes no difference to how long they take.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from tabulate import tabulate

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import tiny

CACHES, WEIGHTS = ("full", "int8", "fp8", "int4"), ("weights-int8", "weights-int4")


def optimised(model: Any, format: str, max_len: int, backend: Any) -> Any:
    passes: dict[str, Any] = {} if format == "full" else {"quantize_kv": {"kv_dtype": format}}
    if format in WEIGHTS:
        passes = {"quantize_weights": {"dtype": format.removeprefix("weights-")}}
    return fxopt.optimize(model, max_len, passes=passes, backend=backend, verify="off")


@torch.no_grad()
def steps(fast: Any, cache: Any, filled: int, count: int) -> list[float]:
    """Seconds of each of some steps behind so many rows; the first one is not timed."""
    cache.pretend(filled)
    token, seconds = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(count + 1):
        began = time.perf_counter()
        fast(token, past_key_values=cache)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


@torch.no_grad()
def prompt(fast: Any, tokens: int) -> float:
    """Seconds of feeding a prompt, at once or in chunks."""
    given = torch.arange(tokens)[None] % fast.config.vocab_size
    began = time.perf_counter()
    fast(given, logits_to_keep=1)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tiny", action="store_true", help="a small random model instead")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=8192)
    parser.add_argument("--filled", type=int, nargs="+", default=(1000, 8000))
    parser.add_argument("--formats", nargs="+", default=CACHES, choices=(*CACHES, *WEIGHTS))
    parser.add_argument("--backend", default="inductor", choices=("eager", "aot_eager", "inductor"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=40, help="tokens of a prompt that is timed as well")
    parser.add_argument("--steps", type=int, default=8, help="of each format in a round")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model: Any = tiny("llama", dtype) if options.tiny else load_model(options.model, dtype)[0]
    formats = dict.fromkeys(["full", *options.formats])
    made = {one: optimised(model, one, options.max_len, options.backend) for one in formats}
    caches = {one: fast.fxopt.engine.new_cache(1) for one, fast in made.items()}
    rows = []
    for filled in options.filled:
        medians: dict[str, list[float]] = {one: [] for one in made}
        prompts: dict[str, list[float]] = {one: [] for one in made}
        for _ in range(options.rounds):
            for one, fast in made.items():
                medians[one].append(statistics.median(steps(fast, caches[one], filled, options.steps)))
                prompts[one].append(prompt(fast, options.prompt))
        for one, found in medians.items():
            ratio = statistics.median(a / b for a, b in zip(found, medians["full"], strict=True))
            fed = statistics.median(a / b for a, b in zip(prompts[one], prompts["full"], strict=True))
            figures = f"{1e3 * statistics.median(found):.2f}", f"{ratio:.2f}", f"{fed:.2f}"
            rows.append([filled, one, *figures])
    print(
        f"{'tiny' if options.tiny else options.model}, {options.dtype}, max_len {options.max_len}, "
        f"{options.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}"
    )
    print(tabulate(rows, ["rows filled", "cache", "ms of a step", "of full", "prompt, of full"], disable_numparse=True))


if __name__ == "__main__":
    main()
