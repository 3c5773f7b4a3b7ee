"""A model that is larger than the memory it may take: stock, and with the weights of most layers read from disk.

    python examples/offload_weights.py --budget 400MiB

A checkpoint is made first (or named with --model), and two processes generate from it. "anonymous" is the
most memory of its own that a process ever had; "while generating" adds what it had of mapped files then.
The stock model has its weights in mapped files, which the system may drop and read again as it likes;
the streamed one reads those of streamed layers piece by piece, and asks the system to forget them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fxopt

PROMPT = 24  # tokens


def status(name: str) -> int:
    """Bytes, from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Peak(threading.Thread):
    """The most anonymous memory, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nbytes = 0

    def run(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, status("RssAnon"))
            time.sleep(0.01)


def make(folder: str, layers: int, hidden: int, dtype: torch.dtype) -> None:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype=dtype,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def child(options: argparse.Namespace) -> None:
    """Generate, and print what that took as JSON."""
    peak = Peak()
    peak.start()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model)
    if options.child == "streamed":
        offload = {"budget": options.budget, "depth": options.depth, "store": options.store}
        ways = {"backend": options.backend, "compile": "layer", "verify": "off", "chunk": PROMPT}
        model = fxopt.optimize(model, 128, passes={"offload_weights": offload}, **ways)
        print(model.fxopt.report, file=sys.stderr)
    Path("/proc/self/clear_refs").write_text("5")  # what follows has a peak of its own
    prompt = torch.arange(3, 3 + PROMPT)[None]
    model.generate(prompt, max_new_tokens=2, do_sample=False)
    read = model.fxopt.stats["weight bytes read"] if options.child == "streamed" else 0
    started = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)
    seconds = time.perf_counter() - started
    found = {
        "tokens": tokens[0, PROMPT:].tolist(),
        "seconds": seconds / options.new,
        "anonymous": peak.nbytes,
        "generating": status("VmHWM"),
        "weights": sum(p.nbytes for p in model.parameters()),
    }
    if options.child == "streamed":
        found["read"] = (model.fxopt.stats["weight bytes read"] - read) // options.new
        print("\n".join(str(model.fxopt.report).splitlines()[-2:]), file=sys.stderr)
    print(json.dumps(found))


def run(arguments: list[str], kind: str, model: str, within: Sequence[str] = ()) -> dict[str, Any]:
    """What a process of one kind found; ``within`` is a command that runs others."""
    command = [*within, sys.executable, __file__, *arguments, "--model", model, "--child", kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with safetensors files; made if none is named")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--budget", default="400MiB", help="of memory for weights")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--store", default="disk", choices=("disk", "cpu"))
    parser.add_argument("--backend", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--child", choices=("stock", "streamed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make(folder, options.layers, options.hidden, getattr(torch, options.dtype))
        model = options.model or folder
        found = {kind: run(sys.argv[1:], kind, model) for kind in ("stock", "streamed")}
    stock, streamed = found.values()
    assert stock["tokens"] == streamed["tokens"], "the tokens differ"
    mib = 2**20
    rows = [
        [kind, one["weights"] / mib, one["anonymous"] / mib, one["generating"] / mib, 1000 * one["seconds"]]
        for kind, one in found.items()
    ]
    print(tabulate(rows, ["MiB", "weights", "anonymous", "while generating", "ms per token"], floatfmt=".0f"))
    print(f"the same tokens; {streamed['read'] / mib:.0f} MiB read per token")


if __name__ == "__main__":
    main()
