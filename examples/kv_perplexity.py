"""What caches, or weights, of fewer bits cost: perplexity of a text, bytes of a token, where greedy tokens part.

    python examples/kv_perplexity.py --tokens 20480
    python examples/kv_perplexity.py --tokens 20480 --formats weights-int8 weights-int4

The text is the reference of the Python language that ``pydoc`` carries (``pydoc_data.topics``), cut into
windows, each fed in chunks through the graphs that write and read the cache.
"""

from __future__ import annotations

import argparse
import math
import platform
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import Tensor

import fxopt
from fxopt.demo_model import load_model

CACHES, WEIGHTS = ("full", "int8", "fp8", "int4"), ("weights-int8", "weights-int4")
PROMPT = 64  # tokens in front of those that are generated


def text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokenizer: Any, tokens: int, length: int) -> Tensor:
    """The first tokens of the text, [windows, length]."""
    ids = tokenizer(text())["input_ids"]
    count = max(1, min(tokens, len(ids)) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def optimised(model: Any, format: str, length: int, backend: str) -> Any:
    passes: dict[str, Any] = {} if format == "full" else {"quantize_kv": {"kv_dtype": format}}
    if format in WEIGHTS:
        passes = {"quantize_weights": {"dtype": format.removeprefix("weights-")}}
    return fxopt.optimize(model, length, passes=passes, backend=backend, verify="off")  # type: ignore[arg-type]


@torch.no_grad()
def perplexity(fast: Any, rows: Tensor) -> float:
    """Of every token but the first of each window."""
    total = 0.0
    for row in rows:
        logits = fast(row[None, :-1]).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (rows.numel() - len(rows)))


def bytes_of_a_token(fast: Any) -> tuple[int, int]:
    """In all buffers of K and V together, and what they would be in bfloat16."""
    facts = fast.fxopt.engine.facts
    kept = sum(one.heads * one.width * one.dtype.itemsize for one in facts.buffers())
    numbers = sum(one.key_heads * one.key_dim + one.value_heads * one.value_dim for one in facts.layers)
    return kept, 2 * numbers


def greedy(fast: Any, rows: Tensor, new: int) -> list[int]:
    prompt = rows[:1, :PROMPT]
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = fast.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **options)
    tokens: list[int] = found[0, prompt.shape[1] :].tolist()
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128, help="greedy tokens that are compared")
    parser.add_argument("--formats", nargs="+", default=CACHES, choices=(*CACHES, *WEIGHTS))
    parser.add_argument("--backend", default="eager", choices=("eager", "inductor"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, getattr(torch, options.dtype))
    rows = windows(tokenizer, options.tokens, options.window)
    print(
        f"{options.model}, {options.dtype}, {rows.numel()} tokens in windows of {rows.shape[1]}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print(tabulate(table(model, rows, options), headers=["cache", "perplexity", "more", "bytes", "to bf16", "tokens"]))


def table(model: Any, rows: Tensor, options: argparse.Namespace) -> list[list[str]]:
    """A row for each format, the first of the cache as the model has it."""
    found: list[list[str]] = []
    full: tuple[float, list[int]] | None = None
    for format in dict.fromkeys(["full", *options.formats]):
        fast = optimised(model, format, rows.shape[1], options.backend)
        now, said = perplexity(fast, rows), greedy(fast, rows, min(options.new, rows.shape[1] - PROMPT))
        before, wanted = full = full or (now, said)
        kept, in_bf16 = bytes_of_a_token(fast)
        more = f"{100 * (now / before - 1):+.2f} %"
        found.append([format, f"{now:.3f}", more, f"{kept}", f"{kept / in_bf16:.3f}x", parted(wanted, said)])
        print(" ".join(found[-1]), flush=True)
    return found


def parted(wanted: list[int], said: list[int]) -> str:
    """Where tokens differ first."""
    first = next((place for place, pair in enumerate(zip(wanted, said, strict=True)) if len(set(pair)) > 1), None)
    return f"all {len(said)} the same" if first is None else f"differ from number {first + 1}"


if __name__ == "__main__":
    main()
