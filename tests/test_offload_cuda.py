"""Weights and caches streamed to a CUDA device: what only one can show. Anything else is shown by a fake one.

python -m pytest tests/test_offload_cuda.py
"""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxopt
from fxopt import InvalidRequestError
from fxopt.cuda_lanes import CudaLanes
from fxopt.families import tiny
from fxopt.offload import StoreError

pytestmark = pytest.mark.cuda

PROMPT = torch.arange(3, 23)[None]
NEW, LAYERS, LONGEST = 8, 6, 64
FAMILIES = ("llama", "gemma2", "mixtral")
DEVICE = torch.device("cuda", 0)


def tokens(model: Any, batch: int = 1) -> Tensor:
    prompt = PROMPT.repeat(batch, 1).to(DEVICE)
    found: Tensor = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    return found


def optimised(model: Any, passes: dict[str, Any], **more: Any) -> Any:
    ways: Any = {"max_len": LONGEST, "chunk": 16, "backend": "aot_eager", "compile": "layer", **more}
    return fxopt.optimize(model, **ways, passes=passes)


def offload(store: str, depth: int, folder: Path) -> dict[str, Any]:
    return {"resident": 0.25, "store": store, "depth": depth, "folder": str(folder)}


# The lanes


def test_copies_go_on_by_themselves() -> None:
    lanes, nbytes = CudaLanes(DEVICE), 1 << 30
    there, back = lanes.host(nbytes), lanes.host(nbytes)
    there.random_(0, 255)
    unpin = [lanes.pin(one) for one in (there, back)]
    room = lanes.room(nbytes)
    lanes.copy_after(lanes.computed())
    lanes.reach(lanes.copied())
    started, start = time.perf_counter(), lanes.copied()
    lanes.copy(room, there)
    lanes.copy(back, room)
    end = lanes.copied()
    asked = time.perf_counter() - started
    lanes.reach(end)
    copying = lanes.seconds(start, end)
    assert copying is not None
    assert asked < copying / 4
    assert torch.equal(there, back)
    for each in unpin:
        each()


def test_lanes_wait_for_each_other() -> None:
    lanes, nbytes = CudaLanes(DEVICE), 64 << 20
    there = lanes.host(nbytes)
    unpin = lanes.pin(there)
    slot, seen = lanes.room(nbytes), torch.zeros(20, dtype=torch.uint8, device=DEVICE)
    for turn in range(20):
        lanes.reach(lanes.copied())
        there.fill_(turn + 1)
        lanes.copy_after(lanes.computed())
        lanes.copy(slot, there)
        lanes.compute_after(lanes.copied())
        seen[turn] = slot[-1]
    assert seen.tolist() == list(range(1, 21))
    unpin()


def test_memory_that_cannot_be_pinned() -> None:
    lanes = CudaLanes(DEVICE)
    memory = lanes.host(1 << 20)
    unpin = lanes.pin(memory)
    with pytest.raises(StoreError, match="cannot be pinned"):
        lanes.pin(memory)  # it is already
    assert torch.ones(3, device=DEVICE).sum().item() == 3  # and nobody else hears of it
    unpin()


# The same tokens


@pytest.mark.parametrize(("family", "store"), itertools.product(FAMILIES, ("cpu", "disk")))
@pytest.mark.parametrize("what", [("offload_weights",), ("offload_kv",), ("offload_weights", "offload_kv")])
def test_tokens(what: tuple[str, ...], family: str, store: str, tmp_path: Path) -> None:
    for depth in (1, 2, 3, 4):
        model = tiny(family, layers=LAYERS).to(DEVICE)
        stock = {batch: tokens(model, batch) for batch in (1, 3)}
        fast = optimised(model, {name: offload(store, depth, tmp_path) for name in what}, verify="off")
        for batch in (1, 3, 1):
            assert torch.equal(tokens(fast, batch), stock[batch]), depth


@pytest.mark.slow
def test_compiled_verified_and_with_a_quantised_cache(tmp_path: Path) -> None:
    plain = optimised(tiny("llama", layers=LAYERS).to(DEVICE), {"quantize_kv": True}, backend="inductor")
    passes = {name: offload("cpu", 2, tmp_path) for name in ("offload_weights", "offload_kv")}
    model = tiny("llama", layers=LAYERS).to(DEVICE)
    fast = optimised(model, {"quantize_kv": True, **passes}, backend="inductor", max_batch=2)
    for batch in (1, 2):
        assert torch.equal(tokens(fast, batch), tokens(plain, batch))
    assert "not recorded as a CUDA graph" in " ".join(str(fast.fxopt.report).split())


# What is moved, and who waits


def test_bytes_and_no_wait_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = {name: offload("cpu", 2, tmp_path) for name in ("offload_weights", "offload_kv")}
    fast = optimised(tiny("llama", layers=LAYERS).to(DEVICE), passes, verify="off")
    engine = fast.fxopt.engine
    cache = fast(PROMPT.to(DEVICE)).past_key_values
    weights, rows = engine.weight_ring, cache.away.ring
    step = engine.decoding(cache, torch.full((1, 1), PROMPT.shape[1], device=DEVICE))
    token = torch.full((1, 1), 5, device=DEVICE)
    cache.record_mask(None, 3)
    step(token)
    weights.settle()
    rows.settle()
    before = weights.tally.counters, rows.tally.counters
    torch.cuda.set_sync_debug_mode("error")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(CudaLanes, "reach", lambda *_: pytest.fail("the host waits for the device"))
            for _ in range(2):
                step(token)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    weights.settle()
    rows.settle()
    after = weights.tally.counters, rows.tally.counters
    placed = fast.fxopt.report.streamed_weights.placement
    assert after[0].nbytes - before[0].nbytes == 2 * placed.moved
    row = sum(map(engine.row_streams.row_bytes, engine.row_streams.placed(1).offloaded))
    filled = PROMPT.shape[1] + 1
    assert after[1].stored - before[1].stored == 2 * row
    assert 0 <= after[1].nbytes - before[1].nbytes - (2 * filled + 1) * row <= 2 * 2 * row
    assert after[0].steps - before[0].steps == 2
    assert after[0].stepping > before[0].stepping


def test_weights_leave_the_device(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS).to(DEVICE)
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    fast = optimised(model, {"offload_weights": offload("cpu", 1, tmp_path)}, verify="off")
    gc.collect()
    placed = fast.fxopt.report.streamed_weights.placement
    left = before - torch.cuda.memory_allocated(DEVICE)
    assert left > 0.8 * (placed.moved - placed.slot_bytes)
    with pytest.raises(InvalidRequestError, match="weights of streamed layers are on the host"):
        fast(PROMPT.to(DEVICE), output_attentions=True)


def test_slots_lie_still(tmp_path: Path) -> None:
    fast = optimised(tiny("llama", layers=LAYERS).to(DEVICE), {"offload_kv": offload("cpu", 2, tmp_path)}, verify="off")
    cache = fast(PROMPT.to(DEVICE)).past_key_values
    addresses = [slot.data_ptr() for slot in cache.away.slots]
    del cache
    tokens(fast)
    assert [slot.data_ptr() for slot in fast(PROMPT.to(DEVICE)).past_key_values.away.slots] == addresses
