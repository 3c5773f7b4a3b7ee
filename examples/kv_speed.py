"""How long a decode step takes over caches of fewer bits; they take turns, so that all feel the machine's moods.

    python examples/kv_speed.py --filled 1000 8000

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

FORMATS = ("full", "int8", "fp8", "int4")


def optimised(model: Any, format: str, max_len: int, backend: Any) -> Any:
    passes = None if format == "full" else {"quantize_kv": {"kv_dtype": format}}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tiny", action="store_true", help="a small random model instead")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=8192)
    parser.add_argument("--filled", type=int, nargs="+", default=(1000, 8000))
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--backend", default="inductor", choices=("eager", "aot_eager", "inductor"))
    parser.add_argument("--threads", type=int, default=2)
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
        for _ in range(options.rounds):
            for one, fast in made.items():
                medians[one].append(statistics.median(steps(fast, caches[one], filled, options.steps)))
        for one, found in medians.items():
            ratio = statistics.median(a / b for a, b in zip(found, medians["full"], strict=True))
            rows.append([filled, one, f"{1e3 * statistics.median(found):.2f}", f"{ratio:.2f}"])
    print(
        f"{'tiny' if options.tiny else options.model}, {options.dtype}, max_len {options.max_len}, "
        f"{options.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}"
    )
    print(tabulate(rows, ["rows filled", "cache", "ms of a step", "of full"], disable_numparse=True))


if __name__ == "__main__":
    main()
