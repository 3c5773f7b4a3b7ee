"""What a step keeps in memory beside weights and cache: Inductor's own allocations, and one planned arena.

    python examples/resident_memory.py --max-len 1200

"planned" is known before anything runs: the arena, and what pieces of code hand to each other. The
peaks are measured, from the profiler's own record of what PyTorch's CPU allocator hands out while a
chunk of a prompt is fed and a token is decoded. The last column is the arena with all that was
allocated beside it; what it has more than is planned is the result of the attention kernel, which
ATen allocates for itself.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def measured(step: Callable[[], object]) -> tuple[int, int]:
    """The bytes at the peak of a step beyond those before it, and how many pieces of memory it asked for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, torch.no_grad():
        step()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    asked = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(asked)), sum(nbytes > 0 for nbytes in asked)


def peaks(fast: Any, prompt: Tensor) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Logits, and what a chunk of the prompt and a decoded token take."""
    with torch.no_grad():
        cache = fast(prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        logits = fast(prompt[:, -1:], past_key_values=cache).logits
    chunk = measured(lambda: fast(prompt[:, -256:], past_key_values=cache, logits_to_keep=1))
    token = measured(lambda: fast(prompt[:, -1:], past_key_values=cache))
    return logits, {"a chunk": chunk, "a token": token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576, help="576 is SmolLM2's; a smaller multiple of 9 is quicker")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=1200)
    parser.add_argument("--compile", default="layer", choices=("layer", "whole"))
    options = parser.parse_args()
    config = LlamaConfig(**{**SMOLLM2, "hidden_size": options.hidden}, num_hidden_layers=options.layers)
    model = LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    prompt = torch.randint(0, 1000, (1, options.max_len - 300), generator=torch.Generator().manual_seed(0))

    ways = {"compile": options.compile, "verify": "off"}
    fast: Any = fxopt.optimize(model, options.max_len, passes={"plan_memory": True}, **ways)
    ours, with_arena = peaks(fast, prompt)
    theirs, without = peaks(fxopt.optimize(model, options.max_len, **ways), prompt)
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2), "the logits differ"

    uses = fast.fxopt.report.arenas.values()
    arena, handed_on = max(use.arena for use in uses), max(use.handed_on for use in uses)
    least = max(use.lower_bound for use in uses)
    print(f"arena {arena:,} bytes, {arena / least:.3f} of the least; handed on {handed_on:,} bytes")
    rows = [[what, *without[what], *with_arena[what]] for what in without]
    print(tabulate(rows, ["", "Inductor's peak", "allocations", "beside the arena", "allocations"], intfmt=","))
    default = max(peak for peak, _ in without.values())
    whole = arena + max(peak for peak, _ in with_arena.values())
    print(f"planned / Inductor's peak: {(arena + handed_on) / default:.3f}; measured: {whole / default:.3f}")


if __name__ == "__main__":
    main()
