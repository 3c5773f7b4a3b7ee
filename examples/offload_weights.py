"""A model that is larger than the memory it may take: stock, and with the weights of most layers read from disk.

    python examples/offload_weights.py --budget 400MiB
    python examples/offload_weights.py --device cuda --store cpu --hidden 4096 --layers 32 --dtype float16 --budget 6GiB

A checkpoint is made first (or named with --model), and two processes generate from it. "anonymous" is the
most memory of its own that a process ever had; "while generating" adds what it had of mapped files then.
The stock model has its weights in mapped files, which the system may drop and read again as it likes;
the streamed one reads those of streamed layers piece by piece, and asks the system to forget them.
"device" is the most that was allocated on a GPU while generating; there a third process leaves to accelerate
what is more than the budget.
"""

from __future__ import annotations

import argparse
import itertools
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
from fxopt.offload.amounts import bytes_of

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
    model: Any = _loaded(options)
    if options.child == "streamed":
        offload = {"budget": options.budget, "depth": options.depth, "store": options.store}
        ways = {"backend": options.backend, "compile": "layer", "verify": "off", "chunk": PROMPT}
        model = fxopt.optimize(model, 128, passes={"offload_weights": offload}, **ways)
        print(model.fxopt.report, file=sys.stderr)
    Path("/proc/self/clear_refs").write_text("5")  # what follows has a peak of its own
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    prompt = torch.arange(3, 3 + PROMPT, device=options.device)[None]
    model.generate(prompt, max_new_tokens=2, do_sample=False)
    read = model.fxopt.stats["weight bytes read"] if options.child == "streamed" else 0
    started = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)
    new = tokens[0, PROMPT:].tolist()
    seconds = time.perf_counter() - started
    found = {
        "tokens": new,
        "device": torch.cuda.max_memory_allocated() if options.device != "cpu" else 0,
        "seconds": seconds / options.new,
        "anonymous": peak.nbytes,
        "generating": status("VmHWM"),
        "weights": sum(p.nbytes for p in model.parameters()),
    }
    if options.child == "streamed":
        found["read"] = (model.fxopt.stats["weight bytes read"] - read) // options.new
        print("\n".join(str(model.fxopt.report).splitlines()[-2:]), file=sys.stderr)
    print(json.dumps(found))


def _loaded(options: argparse.Namespace) -> Any:
    if options.child == "accelerate":
        most = {0: bytes_of("budget", options.budget), "cpu": 1 << 50}
        return AutoModelForCausalLM.from_pretrained(options.model, device_map="auto", max_memory=most)
    return AutoModelForCausalLM.from_pretrained(options.model).to(options.device)


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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--budget", default="400MiB", help="of memory for weights")
    parser.add_argument("--depth", type=int)
    parser.add_argument("--store", default="disk", choices=("disk", "cpu"))
    parser.add_argument("--backend", default="inductor", choices=("inductor", "aot_eager"))
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--child", choices=("stock", "streamed", "accelerate"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make(folder, options.layers, options.hidden, getattr(torch, options.dtype))
        model = options.model or folder
        kinds = ["stock", "streamed", *(["accelerate"] if options.device != "cpu" else [])]
        found = {kind: run(sys.argv[1:], kind, model) for kind in kinds}
    stock, streamed = found["stock"], found["streamed"]
    pairs = zip(stock["tokens"], streamed["tokens"], strict=True)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert alike == options.new or options.dtype != "float32", "the tokens differ"
    mib = 2**20
    columns = ["weights", "anonymous", "generating", *(["device"] if options.device != "cpu" else [])]
    rows = [[kind, *(one[name] / mib for name in columns), 1000 * one["seconds"]] for kind, one in found.items()]
    titles = ["while generating" if name == "generating" else name for name in columns]
    print(tabulate(rows, ["MiB", *titles, "ms per token"], floatfmt=".0f"))
    same = "the same tokens" if alike == options.new else f"the same {alike} tokens of {options.new}"
    print(f"{same}; {streamed['read'] / mib:.0f} MiB read per token")


if __name__ == "__main__":
    main()
