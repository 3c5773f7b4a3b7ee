"""What a decode step moves between the device and where the cache lies: fxopt, and Transformers' offloaded_static.

    python examples/kv_traffic.py --max-len 8192 --filled 1000 4000

All layers are away in both. The bytes of fxopt are those that its store counts while it decodes. Those of
Transformers are the buffers of its cache, which it moves whole, in and out, for every token (its streams need
CUDA; what ``StaticLayer.prefetch`` and ``offload`` copy is as large anywhere).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate
from transformers import StaticCache

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import tiny

STEPS = 4


@torch.no_grad()
def ours(fast: Any, filled: int) -> tuple[float, float]:
    """Bytes read and stored for a token, with so many rows filled."""
    engine = fast.fxopt.engine
    cache, tokens = engine.new_cache(1), torch.zeros(1, 1, dtype=torch.long, device=engine.facts.device)
    cache.pretend(filled)
    fast(tokens, past_key_values=cache)
    cache.away.ring.settle()
    before = engine.row_streams.tally.counters
    for _ in range(STEPS):
        fast(tokens, past_key_values=cache)
    cache.away.ring.settle()
    after = engine.row_streams.tally.counters
    return (after.nbytes - before.nbytes) / STEPS, (after.stored - before.stored) / STEPS


def theirs(model: Any, max_len: int) -> tuple[int, int]:
    """The same for Transformers, whatever is filled."""
    cache = StaticCache(model.config, max_cache_len=max_len)
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, width, model.dtype, torch.device("meta"))
    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return nbytes, nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tiny", action="store_true", help="a random model of four layers instead")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--max-len", type=int, default=8192)
    parser.add_argument("--filled", type=int, nargs="+", default=(1000, 4000))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model: Any = tiny("llama", dtype, layers=4) if options.tiny else load_model(options.model, dtype)[0]
    model.to(options.device)
    ways: Any = {"backend": "aot_eager", "compile": "layer", "verify": "off"}
    fast = fxopt.optimize(model, options.max_len, passes={"offload_kv": {"resident": 0.0, "store": "cpu"}}, **ways)
    rows = []
    for filled in options.filled:
        moved = {"fxopt": ours(fast, filled), "offloaded_static": theirs(model, options.max_len)}
        for name, (read, stored) in moved.items():
            times = sum(moved["offloaded_static"]) / (read + stored)
            rows.append([filled, name, read / 2**20, stored / 2**10, f"{times:.1f}x less"])
    print(tabulate(rows, ["rows filled", "", "MiB in", "KiB out", "than offloaded_static"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
