"""How much memory ``fxopt.optimize`` takes at its peak, beside what it must hold.

    python examples/peak_memory.py --backend inductor

Counts what PyTorch's CPU allocator hands out, from the profiler's own record. The model is made
inside the record, since the profiler knows the size of nothing that was allocated before it began.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt

MARK = "fxopt.optimize"


def measure(config: LlamaConfig, dtype: torch.dtype, max_len: int, backend: str) -> tuple[int, int, int]:
    """Bytes of weights, of cache buffers, and at the peak of ``optimize``, for a random model."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = LlamaForCausalLM(config).to(dtype).eval()
        with record_function(MARK):
            fast = fxopt.optimize(model, max_len=max_len, backend=backend)  # type: ignore[arg-type]
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    began = next(event.start_ns() for event in events if event.name() == MARK)
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if event.start_ns() >= began else now
    return weights, fast.fxopt.kv_bytes, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=1200)
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    smollm2 = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    weights, buffers, peak = measure(smollm2, getattr(torch, options.dtype), options.max_len, options.backend)
    mib = 2**20
    print(f"weights {weights / mib:.1f} MiB, KV buffers {buffers / mib:.1f} MiB, peak {peak / mib:.1f} MiB")
    print(f"peak / (weights + KV buffers) = {peak / (weights + buffers):.3f}")


if __name__ == "__main__":
    main()
