"""A context whose cache is larger than the memory it may take: all of it in memory, and most of it on disk.

    python examples/offload_kv.py --budget 100MiB

Two processes read a prompt of --tokens tokens and generate a few more. "cache" is what all rows take, "anonymous"
the most memory of its own that a process had.
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


def model_of(layers: int) -> Any:
    """A model whose cache is large beside its weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def child(options: argparse.Namespace) -> None:
    """Generate, and print what that took as JSON."""
    peak = Peak()
    peak.start()
    model = model_of(options.layers)
    offload = {"budget": options.budget, "depth": options.depth, "store": options.store}
    ways: Any = {"backend": options.backend, "compile": "layer", "verify": "off", "chunk": options.chunk}
    passes: Any = {"offload_kv": offload} if options.child == "away" else None
    fast: Any = fxopt.optimize(model, options.tokens + NEW, passes=passes, **ways)
    if options.child == "away":
        print(fast.fxopt.report, file=sys.stderr)
    prompt = torch.randint(3, 256, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    started = time.perf_counter()
    tokens = fast.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    facts, stats = fast.fxopt.engine.facts, fast.fxopt.stats
    found = {
        "tokens": tokens[0, options.tokens :].tolist(),
        "seconds": time.perf_counter() - started,
        "cache": sum(2 * one.key_heads * one.key_dim * 4 * facts.capacity for one in facts.layers),
        "held": fast.fxopt.kv_bytes,
        "anonymous": peak.nbytes,
        "read": stats["cache bytes read"],
        "stored": stats["cache bytes stored"],
    }
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
    parser.add_argument("--budget", default="100MiB", help="of memory for the cache")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--store", default="disk", choices=("disk", "cpu"))
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--backend", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--child", choices=("here", "away"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    found = {kind: run(sys.argv[1:], kind) for kind in ("here", "away")}
    assert found["here"]["tokens"] == found["away"]["tokens"], "the tokens differ"
    mib = 2**20
    columns = ("cache", "held", "anonymous", "read", "stored")
    rows = [[kind, *(one[name] / mib for name in columns), one["seconds"]] for kind, one in found.items()]
    print(tabulate(rows, ["MiB", *columns, "seconds"], floatfmt=".0f"))
    print("the same tokens")


if __name__ == "__main__":
    main()
