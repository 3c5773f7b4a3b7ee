"""How much memory ``fxopt.optimize`` takes at its peak, beside what it must hold.

    python examples/peak_memory.py --model demo --backend inductor

Counts what PyTorch's CPU allocator hands out (tensors), from the profiler's own record: the
weights lie there before, so the peak above them is buffers plus whatever is temporary.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

import fxopt
from fxopt.demo_model import load_model


def peak_bytes(work: object) -> tuple[int, object]:
    """The most that was allocated at once, above what was there before, while ``work`` ran."""
    assert callable(work)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--max-len", type=int, default=1200)
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    model, _ = load_model(options.model, getattr(torch, options.dtype))
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    peak, fast = peak_bytes(lambda: fxopt.optimize(model, max_len=options.max_len, backend=options.backend))
    buffers = fast.fxopt.kv_bytes  # type: ignore[attr-defined]
    ratio = (weights + peak) / (weights + buffers)
    mib = 2**20
    print(f"weights {weights / mib:.1f} MiB, KV buffers {buffers / mib:.1f} MiB, peak {(weights + peak) / mib:.1f} MiB")
    print(f"peak / (weights + KV buffers) = {ratio:.3f}")


if __name__ == "__main__":
    main()
