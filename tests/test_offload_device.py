"""Models streamed to a fake device: stock tokens whatever is put off, and no more is moved than has to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import COPIES, ORDERS, Device, FakeLanes, fake_device
from torch import Tensor

import fxopt
from fxopt import InvalidRequestError, device_lanes
from fxopt.cache import BufferPool
from fxopt.device_rows import DeviceRows, stage_bytes
from fxopt.families import tiny
from fxopt.file_weights import raw
from fxopt.offload import StoreError
from fxopt.offload.rows import Block, Strips
from fxopt.passes.offload_kv import OffloadKV
from fxopt.row_streams import RowStreams

PROMPT = torch.arange(3, 23)[None]
NEW, LAYERS, LONGEST = 6, 5, 64
ORDER_OF = itertools.cycle(ORDERS)


def tokens(model: Any, batch: int = 1) -> Tensor:
    found: Tensor = model.generate(PROMPT.repeat(batch, 1), max_new_tokens=NEW, do_sample=False)
    return found


def optimised(model: Any, **more: Any) -> Any:
    ways: Any = {"max_len": LONGEST, "chunk": 16, "backend": "aot_eager", "compile": "layer", "verify": "off", **more}
    return fxopt.optimize(model, **ways)


# Rows: as many bytes as there are, wherever they rest


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("part", [1, 100, 1 << 20])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_come_back(kind: str, part: int, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of several widths, as codes and scales have, for fewer sequences than there is room for."""
    monkeypatch.setattr("fxopt.device_rows.PART", part)
    lanes = FakeLanes(order)
    block = Block((Strips(2, 24), Strips(2, 2), Strips(1, 5), Strips(3, 4)), sequences=3, capacity=16)
    rows = DeviceRows([block, block], lanes, kind, tmp_path)
    slot, other = lanes.room(block.nbytes), lanes.room(block.nbytes)
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, 256, (block.nbytes,), dtype=torch.uint8, generator=generator)
    rows.begin(2)
    slot.copy_(known)
    for start, end in ((0, 7), (7, 8), (8, 11)):
        assert rows.put(1, start, end, slot) == (end - start) * 2 * block.row_bytes
    assert rows.fill(1, other) == 11 * 2 * block.row_bytes
    lanes.reach(lanes.copied())
    filled = torch.zeros_like(known)
    for number in range(len(block.buffers)):
        for at, nbytes in block.runs(number, 2, 0, 11):
            filled[at : at + nbytes] = known[at : at + nbytes]
        runs = list(block.runs(number, 2, 5, 9))
        found = torch.zeros(sum(nbytes for _, nbytes in runs), dtype=torch.uint8)
        rows.read(1, number, 5, 9, raw(found))
        assert torch.equal(found, torch.cat([known[at : at + nbytes] for at, nbytes in runs]))
        rows.write(0, number, 5, 9, raw(found))
    assert torch.equal(other, filled)
    rows.crop(9)
    assert rows.fill(0, other) == 9 * 2 * block.row_bytes
    rows.close()
    assert not lanes.pinned


def test_slots_that_held_another_layout_are_cleared(tmp_path: Path) -> None:
    lanes = FakeLanes("both late")
    one, two = Block((Strips(2, 8),), 1, 16), Block((Strips(1, 8),), 1, 16)
    rows = DeviceRows([one, two], lanes, "cpu")
    rows.begin(1)
    slot = lanes.room(one.nbytes)
    rows.fill(0, slot)
    slot.fill_(255)
    rows.fill(1, slot)
    lanes.reach(lanes.copied())
    assert not slot.any()


def test_rows_rest_in_little_memory() -> None:
    large = Block((Strips(8, 256), Strips(8, 256)), sequences=1, capacity=32768)
    assert stage_bytes([large]) == device_lanes.PART < large.nbytes / 8
    small = Block((Strips(2, 8),), sequences=4, capacity=16)
    assert stage_bytes([small]) == small.nbytes


# The cache


@pytest.fixture(scope="module", params=["llama", "gemma2", "mixtral"])
def away(request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[int, Tensor], Device]]:
    model: Any = tiny(request.param, torch.bfloat16 if request.param == "mixtral" else torch.float32, layers=LAYERS)
    stock = {batch: tokens(model, batch) for batch in (1, 3)}
    with fake_device(FakeLanes()) as device:
        yield optimised(model, passes={"offload_kv": {"resident": 0.25, "store": "cpu"}}), stock, device


def ask_anew(fast: Any, device: Device, lanes: FakeLanes, **offload: Any) -> None:
    """Other caches on another device for the same compiled code."""
    device.lanes, engine = lanes, fast.fxopt.engine
    engine.row_streams = RowStreams(OffloadKV(**offload), engine.facts)
    engine.pool = BufferPool(engine.facts, row_streams=engine.row_streams)


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_tokens_and_bytes_of_a_cache(store: str, depth: int, away: Any, tmp_path: Path) -> None:
    fast, stock, device = away
    order = next(ORDER_OF)
    ask_anew(fast, device, FakeLanes(order), resident=0.0, store=store, depth=depth, folder=str(tmp_path))
    engine = fast.fxopt.engine
    for batch in (3, 1):
        assert torch.equal(tokens(fast, batch), stock[batch]), order
    cache = fast(PROMPT).past_key_values
    facts = engine.facts
    row = sum(b.heads * b.width * b.dtype.itemsize for b in facts.buffers())
    cache.away.ring.settle()
    before = engine.row_streams.tally.counters
    device.lanes.reached.clear()
    fast(PROMPT[:, :1], past_key_values=cache)
    reached = list(device.lanes.reached)
    cache.away.ring.settle()
    after = engine.row_streams.tally.counters
    assert after.stored - before.stored == row
    # Some of what is read is for the next step, which finds one row more.
    assert 0 <= after.nbytes - before.nbytes - PROMPT.shape[1] * row <= depth * row
    assert engine.pool.nbytes == engine.row_streams.placed(1).device_bytes + engine.row_streams.placed(4).device_bytes
    if store == "cpu":
        assert reached == []  # nobody waits while a step is put into the lanes


@pytest.mark.parametrize(
    ("wait", "store"), [("compute_after", "cpu"), ("copy_after", "cpu"), ("reach", "cpu"), ("reach", "disk")]
)
def test_no_wait_of_a_cache_can_be_left_out(wait: str, store: str, away: Any, tmp_path: Path) -> None:
    fast, stock, device = away

    def same(order: str) -> bool:
        ask_anew(fast, device, FakeLanes(order, deaf=wait), resident=0.0, store=store, depth=2, folder=str(tmp_path))
        if wait == "reach" and store == "cpu":  # what is read by others than layers: the rows of a copy
            cache = fast(PROMPT).past_key_values
            rows = cache.layers[-1].read(0, 20)[0].clone()
            device.lanes.deaf = ""
            return torch.equal(rows, cache.layers[-1].read(0, 20)[0])
        return torch.equal(tokens(fast), stock[1])

    assert not all(same(order) for order in ORDERS)


def test_beams_copies_and_drafts(away: Any) -> None:
    fast, _, device = away
    ask_anew(fast, device, FakeLanes("both late"), resident=0.0, store="cpu", depth=2)
    here = tiny(fast.config.model_type, fast.dtype, layers=LAYERS)
    for way in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        want = here.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **way)
        assert torch.equal(fast.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **way), want)


def test_memory_that_cannot_be_pinned_for_a_cache(away: Any) -> None:
    fast, stock, device = away
    ask_anew(fast, device, FakeLanes("both late", most_pinned=1000), resident=0.0, store="cpu")
    with pytest.raises((StoreError, fxopt.errors.CacheMemoryError), match="cannot be pinned"):
        tokens(fast)
    device.lanes.most_pinned = 1 << 40
    assert torch.equal(tokens(fast), stock[1])


# Weights


@pytest.mark.parametrize(
    ("family", "store", "depth"),
    [("llama", "cpu", 2), ("llama", "disk", 4), ("gemma2", "disk", 3), ("mixtral", "cpu", 1)],
)
def test_tokens_and_bytes_of_weights(family: str, store: str, depth: int, tmp_path: Path) -> None:
    model: Any = tiny(family, torch.bfloat16 if family == "mixtral" else torch.float32, layers=LAYERS)
    stock = {batch: tokens(model, batch) for batch in (1, 2)}
    offload = {"resident": 0.0, "store": store, "depth": depth, "folder": str(tmp_path)}
    with fake_device(FakeLanes()) as device:
        fast = optimised(model, passes={"offload_weights": offload})
        ring, use = fast.fxopt.engine.weight_ring, fast.fxopt.report.streamed_weights
        assert use.predicted.moved == use.placement.moved
        for order in ORDERS:
            device.lanes.order = order
            for batch in (1, 2):
                assert torch.equal(tokens(fast, batch), stock[batch]), order
        cache = fast(PROMPT).past_key_values
        ring.settle()
        before = ring.tally.counters.nbytes
        device.lanes.reached.clear()
        for _ in range(3):
            fast(PROMPT[:, :1], past_key_values=cache)
        assert store == "disk" or device.lanes.reached == []
        ring.settle()
        assert ring.tally.counters.nbytes - before == 3 * use.placement.moved
        with torch.no_grad():
            for layer in model.model.layers:
                for parameter in layer.parameters():
                    parameter.mul_(-1.5)
        changed = tokens(model)
        assert not torch.equal(changed, stock[1])
        assert torch.equal(tokens(fast), changed)
        for wait in ("compute_after", "copy_after", *(["reach"] if store == "disk" else [])):
            found = []
            for order in ORDERS:
                device.lanes.order, device.lanes.deaf = order, wait
                found.append(torch.equal(tokens(fast), changed))
                device.lanes.deaf = ""
                ring.settle()
            assert not all(found), wait


def test_memory_that_cannot_be_pinned_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    addresses, stock = [p.data_ptr() for p in model.parameters()], tokens(model)
    for store in ("cpu", "disk"):
        offload = {"resident": 0.2, "store": store, "folder": str(tmp_path)}
        with fake_device(FakeLanes(most_pinned=1000)), pytest.raises(StoreError, match="cannot be pinned"):
            optimised(model, passes={"offload_weights": offload})
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert list(tmp_path.iterdir()) == []
    assert torch.equal(tokens(model), stock)


# Together


def test_both_with_a_quantised_cache_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model is asked before its weights leave, and not again: on a device it could not answer."""
    model: Any = tiny("llama", layers=LAYERS)
    plain = optimised(tiny("llama", layers=LAYERS), passes={"quantize_kv": True})
    stock = {batch: tokens(plain, batch) for batch in (1, 2)}
    reseat = fxopt.moved_weights.MovedWeights.reseat
    forward = type(model).forward

    def gone(*given: Any, **more: Any) -> None:
        pytest.fail("the stock model was asked after its weights had left")

    def leave(self: Any) -> None:
        reseat(self)
        monkeypatch.setattr(type(model), "forward", gone)

    monkeypatch.setattr(fxopt.moved_weights.MovedWeights, "reseat", leave)
    passes: Any = {
        "quantize_kv": True,
        "offload_kv": {"resident": 0.0, "store": "cpu"},
        "offload_weights": {"resident": 0.2, "store": "cpu"},
    }
    with fake_device(FakeLanes("both late")) as device:
        fast = optimised(model, verify="final", max_batch=2, passes=passes)
        monkeypatch.setattr(type(model), "forward", forward)
        for order in ORDERS:
            device.lanes.order = order
            for batch in (1, 2):
                assert torch.equal(tokens(fast, batch), stock[batch]), order
        stats = fast.fxopt.stats
        assert stats["weight bytes read"]
        assert stats["cache bytes read"]
        assert stats["cache bytes stored"]
        assert COPIES in device.lanes.reached


def test_what_the_models_own_code_would_have_to_do() -> None:
    """Weights on two devices; a tensor without values stands for one on the host."""
    fast = optimised(tiny("llama", layers=LAYERS), passes={"offload_weights": {"store": "cpu"}})
    fast(PROMPT, output_attentions=True)
    layer: Any = fast.model.layers[0].mlp
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight.to("meta"))
    with pytest.raises(
        InvalidRequestError, match=r"needs the model's own code .*weights of streamed layers are on the host"
    ):
        fast(PROMPT, output_attentions=True)
