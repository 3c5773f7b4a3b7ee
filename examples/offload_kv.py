"""A context whose cache is larger than the memory it may take: all of it in memory, and most of it on disk.

    python examples/offload_kv.py --budget 100MiB
    python examples/offload_kv.py --device cuda --store cpu --tokens 32768 --dtype bfloat16 --shape 7b --budget 1GiB

Two processes read a prompt of --tokens tokens and generate a few more; on a GPU a third one does so with
Transformers' offloaded_static. "cache" is what all rows take, "anonymous" the most memory of its own that a process
had, "device" the most of the GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from offload_weights import Peak
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt

NEW = 8


#: hidden size, size between the two halves of a layer, heads
SHAPES = {"flat": (128, 256, 8), "7b": (4096, 11008, 32)}


def model_of(options: argparse.Namespace) -> Any:
    """Random weights; "flat" has a cache that is large beside them."""
    hidden, between, heads = SHAPES[options.shape]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=128,
        max_position_embeddings=1 << 20,
        dtype=getattr(torch, options.dtype),
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlamaForCausalLM(config).to(config.dtype).eval()


def child(options: argparse.Namespace) -> None:
    """Generate, and print what that took as JSON."""
    peak = Peak()
    peak.start()
    model = model_of(options)
    way = {"cache_implementation": "offloaded_static"} if options.child == "offloaded_static" else {}
    offload = {"budget": options.budget, "depth": options.depth, "store": options.store}
    ways: Any = {"backend": options.backend, "compile": "layer", "verify": "off", "chunk": options.chunk}
    passes: Any = {"offload_kv": offload} if options.child == "away" else None
    fast: Any = model if way else fxopt.optimize(model, options.tokens + NEW, passes=passes, **ways)
    if options.child == "away":
        print(fast.fxopt.report, file=sys.stderr)
    prompt = torch.randint(3, 256, (1, options.tokens), generator=torch.Generator().manual_seed(1)).to(options.device)

    def seconds(new: int) -> tuple[float, Any]:
        started = time.perf_counter()
        tokens = fast.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **way)
        found = tokens[0, options.tokens :].tolist()
        return time.perf_counter() - started, found

    took, found_tokens = seconds(NEW)
    # Of a GPU the second run is told, when everything has been compiled: all new tokens, less a run of one.
    each = (seconds(NEW)[0] - seconds(1)[0]) / (NEW - 1) if options.device != "cpu" else 0.0
    config, stats = model.config, {} if way else fast.fxopt.stats
    rows = options.tokens + NEW if way else fast.fxopt.engine.facts.capacity
    row = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    found = {
        "tokens": found_tokens,
        "seconds": took,
        "token": each,
        "cache": config.num_hidden_layers * row * rows,
        "held": 0 if way else fast.fxopt.kv_bytes,
        "anonymous": peak.nbytes,
        "device": torch.cuda.max_memory_allocated() if options.device != "cpu" else 0,
        "read": stats.get("cache bytes read", 0),
        "stored": stats.get("cache bytes stored", 0),
    }
    if options.child == "away":
        print("\n".join(str(fast.fxopt.report).splitlines()[-2:]), file=sys.stderr)
    print(json.dumps(found))


def run(arguments: list[str], kind: str, within: Sequence[str] = ()) -> dict[str, Any]:
    """What a process of one kind found; ``within`` is a command that runs others."""
    command = [*within, sys.executable, __file__, *arguments, "--child", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", default="flat", choices=tuple(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--budget", default="100MiB", help="of memory for the cache")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--store", default="disk", choices=("disk", "cpu"))
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--child", choices=("here", "away", "offloaded_static"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    kinds = ["here", "away", *(["offloaded_static"] if options.device != "cpu" else [])]
    found = {kind: run(sys.argv[1:], kind) for kind in kinds}
    assert found["here"]["tokens"] == found["away"]["tokens"], "the tokens differ"
    mib = 2**20
    columns = ["cache", "held", "anonymous", *(["device"] if options.device != "cpu" else []), "read", "stored"]
    rows = [
        [kind, *(one[name] / mib for name in columns), one["seconds"], 1000 * one["token"]]
        for kind, one in found.items()
    ]
    print(tabulate(rows, ["MiB", *columns, "seconds", "ms per token"], floatfmt=".0f"))
    print("the same tokens")


if __name__ == "__main__":
    main()
