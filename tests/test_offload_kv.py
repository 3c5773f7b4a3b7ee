"""The pass ``offload_kv``: the same tokens from slots, what is moved, every way to generate, and every refusal."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import threading
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_modes import MODES
from memory_limits import at_most
from offload_kv import run
from torch import Tensor
from ways_to_generate import CHUNK, GREEDY, MAX_LEN, TWO, Side, lively, play, play_stock, slightly_off

import fxopt
from fxopt import ArtifactError, InvalidRequestError, RewriteError
from fxopt.cache import BufferPool
from fxopt.demo_model import is_demo_installed, load_model
from fxopt.errors import CacheMemoryError
from fxopt.families import tiny
from fxopt.offload import StoreError, row_file
from fxopt.passes.offload_kv import OffloadKV
from fxopt.report_page import as_page
from fxopt.row_streams import RowStreams

PROMPT = torch.arange(3, 23)[None]
NEW, LAYERS, LONGEST = 8, 6, 64
AWAY = (0, 2, 3, 5)


def tokens(model: Any, batch: int = 1, prompt: Tensor = PROMPT) -> Tensor:
    found: Tensor = model.generate(prompt.repeat(batch, 1), max_new_tokens=NEW, do_sample=False)
    return found


def away(
    model: Any, tmp_path: Path | None = None, *, more: dict[str, Any] | None = None, verify: str = "off", **offload: Any
) -> Any:
    if tmp_path is not None:
        offload["folder"] = str(tmp_path)
    ways: Any = {"max_len": LONGEST, "chunk": 16, "backend": "aot_eager", "compile": "layer", "verify": "off"}
    passes: dict[str, Any] = {"offload_kv": {"resident": 0.25, **offload}, **(more or {})}
    return fxopt.optimize(model, **ways, passes=passes)


def row_bytes(fast: Any) -> int:
    """What one token takes in all K and V of one layer."""
    facts = fast.fxopt.engine.facts
    return sum(b.heads * b.width * b.dtype.itemsize for b, layer in facts.buffers().items() if layer == 0)


# The same tokens, and what is moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_tokens_and_bytes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = tiny(family, dtype, layers=LAYERS)
    stock = {batch: tokens(model, batch) for batch in (1, 3)}
    fast = away(model, tmp_path)
    assert fast.fxopt.report.streamed_cache.placement.offloaded == AWAY
    for store, depth in product(("disk", "cpu"), (1, 2, 3, 4)):
        ask_anew(fast, store=store, depth=depth, resident=0.25, folder=str(tmp_path))
        for batch in (1, 3, 1):
            assert torch.equal(tokens(fast, batch), stock[batch])
        cache = fast(PROMPT).past_key_values
        assert len(cache.away.slots) == depth
        for step in range(3):
            before = moved(fast, cache)
            fast(PROMPT[:, :1], past_key_values=cache)
            read, stored = (now - then for now, then in zip(moved(fast, cache), before, strict=True))
            assert stored == len(AWAY) * row_bytes(fast)
            filled = PROMPT.shape[1] + step
            # Some of what is read is for the next step, which finds one row more.
            assert 0 <= read - filled * len(AWAY) * row_bytes(fast) <= depth * row_bytes(fast)


def ask_anew(fast: Any, **offload: Any) -> None:
    """Other caches for the same compiled code: which of their layers are away is decided when they are made."""
    engine = fast.fxopt.engine
    engine.row_streams = RowStreams(OffloadKV(**offload), engine.facts)
    engine.pool = BufferPool(engine.facts, row_streams=engine.row_streams)


def moved(fast: Any, cache: Any) -> tuple[int, int]:
    """The bytes that the store has read and written, when it has done what it was asked to."""
    cache.away.ring.settle()
    counted = fast.fxopt.engine.row_streams.tally.counters
    return counted.nbytes, counted.stored


@pytest.mark.parametrize("store", ["disk", "cpu"])
def test_weights_and_cache_together(store: str, tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    stock = [tokens(model, batch) for batch in (1, 2)]
    weights = {"resident": 0.5, "store": store, "folder": str(tmp_path)}
    fast = away(model, tmp_path, store=store, more={"offload_weights": weights})
    assert [tokens(fast, batch).tolist() for batch in (1, 2)] == [one.tolist() for one in stock]
    stats = fast.fxopt.stats
    assert stats["weight bytes read"]
    assert stats["cache bytes read"]
    assert stats["cache bytes stored"]
    assert not stats["weight bytes stored"]


@pytest.mark.parametrize("off", ["window_kv", "fuse_qkv", "grouped_attention"])
def test_without_another_pass(off: str, tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    fast = away(model, tmp_path, more={off: False})
    for batch in (1, 2):
        assert torch.equal(tokens(fast, batch), tokens(model, batch))


@pytest.mark.slow
def test_compiled_and_verified(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    ways: Any = {"chunk": 16, "compile": "layer", "max_batch": 2}
    fast = fxopt.optimize(model, LONGEST, **ways, passes={"offload_kv": {"folder": str(tmp_path)}, "plan_memory": True})
    for batch in (1, 2):
        assert torch.equal(tokens(fast, batch), tokens(model, batch))
    assert fast.fxopt.report["offload_kv"].matched == 3


# Every way to generate


@pytest.fixture(scope="module")
def sides() -> tuple[Side, Side]:
    model, draft = lively("llama", layers=4), slightly_off(lively("llama", layers=4))
    ways: Any = {"max_len": MAX_LEN, "backend": "aot_eager", "compile": "layer", "chunk": CHUNK, "verify": "off"}
    fast, fast_draft = (fxopt.optimize(one, **ways, passes={"offload_kv": {"store": "cpu"}}) for one in (model, draft))
    greedy = model.generate(**TWO, **GREEDY).tolist()
    return Side(model, draft, draft, greedy), Side(fast, draft, fast_draft, greedy)


@pytest.mark.parametrize("name", MODES)
def test_mode(sides: tuple[Side, Side], name: str, other_versions: str) -> None:
    mode = MODES[name]
    if reason := mode.unless.get("llama"):
        pytest.skip(f"not for the stock llama: {reason}")
    expected, found = play_stock(mode, sides[0], other_versions), play(mode, sides[1])
    assert found.exact == expected.exact
    torch.testing.assert_close(found.close, expected.close, atol=1e-3, rtol=1e-3)


def test_an_offloaded_static_cache_asked_for_by_name_is_this_one(sides: tuple[Side, Side]) -> None:
    fast = sides[1].model
    before = Counter(fast.fxopt.stats)
    found = fast.generate(**TWO, **GREEDY, cache_implementation="offloaded_static", return_dict_in_generate=True)
    assert found.sequences.tolist() == sides[0].greedy
    assert found.past_key_values.away is not None
    assert fast.fxopt.stats["eager: a foreign cache (StaticCache)"] == before["eager: a foreign cache (StaticCache)"]


def test_a_cache_that_is_copied_cropped_and_gone_on_with(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    fast = away(model, tmp_path)
    cache = fast(PROMPT).past_key_values
    twin = copy.deepcopy(cache)
    first = fast(PROMPT[:, :3], past_key_values=cache).logits
    assert torch.equal(fast(PROMPT[:, :3], past_key_values=twin).logits, first)
    twin.crop(-3)
    assert torch.equal(fast(PROMPT[:, :3], past_key_values=twin).logits, first)
    cache.crop(-3)
    rows = [rows.clone() for rows in cache.layers[0].read(0, cache.length)]
    cache.batch_repeat_interleave(2)
    assert all(
        torch.equal(now, then.repeat(2, 1, 1, 1)) for now, then in zip(cache.layers[0].read(0, 20), rows, strict=True)
    )
    both = fast(PROMPT[:, :3].repeat(2, 1), past_key_values=cache).logits
    assert torch.allclose(both, first.repeat(2, 1, 1), atol=1e-5)


def test_the_next_user_of_a_set_finds_nothing_of_the_last_one(tmp_path: Path) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    fast = away(model, tmp_path)
    cache = fast(PROMPT).past_key_values
    cache.layers[0].write(*(torch.full_like(rows, torch.nan) for rows in cache.layers[0].read(0, 3)))
    fast(PROMPT[:, :1], past_key_values=cache)
    buffers = cache.buffers
    del cache
    gc.collect()
    assert torch.equal(tokens(fast), tokens(model))
    assert fast(PROMPT).past_key_values.buffers is buffers


def test_threads_have_rings_of_their_own(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    fast = away(model, tmp_path)
    prompts = [PROMPT, PROMPT.flip(1), PROMPT + 5]
    stock = [tokens(model, prompt=one) for one in prompts]
    found: dict[int, Tensor] = {}

    def ask(number: int) -> None:
        for _ in range(3):
            found[number] = tokens(fast, prompt=prompts[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], one) for number, one in enumerate(stock))


# Memory


def test_a_budget_holds_whatever_the_batch(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    whole = away(model, tmp_path, resident=1.0).fxopt.engine
    one = whole.new_cache(1).buffers.nbytes
    fast = away(model, tmp_path, resident=None, budget=2 * one)
    assert "all 6 layers of one sequence fit into the budget" in str(fast.fxopt.report)
    for batch in (1, 2, 4):
        cache = fast.fxopt.engine.new_cache(batch)
        assert cache.buffers.nbytes <= 2 * one
        assert (cache.away is None) == (batch <= 2)
        assert torch.equal(tokens(fast, batch), tokens(model, batch))
    with pytest.raises(InvalidRequestError, match=r"budget=.* holds less than what always stays"):
        tokens(fast, 64)
    assert torch.equal(tokens(fast, 4), tokens(model, 4))


def test_memory_of_slots_counts_as_memory_of_caches(tmp_path: Path) -> None:
    fast = away(tiny("llama", layers=LAYERS), tmp_path)
    buffers = fast(PROMPT).past_key_values.buffers
    tensors = [*buffers.tensors.values(), buffers.mask, *buffers.away.slots]
    assert fast.fxopt.kv_bytes == buffers.nbytes == sum(tensor.nbytes for tensor in tensors)
    assert fast.fxopt.kv_bytes == fast.fxopt.report.streamed_cache.placement.device_bytes
    fast.fxopt.engine.pool._most_bytes = 100
    with pytest.raises(CacheMemoryError, match="max_cache_bytes=100 allows less"):
        fast.generate(PROMPT.repeat(3, 1), max_new_tokens=2)


@pytest.mark.slow
def test_a_process_with_less_memory_than_its_cache_needs() -> None:
    """520 MiB of cache and 100 MiB for it, in a process that is killed if it takes more than 750 MiB for everything."""
    limit = 750 << 20
    arguments = ["--budget", "100MiB", "--backend", "aot_eager"]
    here = run(arguments, "here")
    assert here["anonymous"] > limit
    with at_most(limit) as within:
        found = run(arguments, "away", within)
    assert found["tokens"] == here["tokens"]
    assert found["held"] <= 100 << 20 < found["cache"]
    assert found["anonymous"] < here["anonymous"] - 300 * 2**20
    assert 0.8 < found["stored"] / found["cache"] < 1.0  # rows of the layer that stays are not stored, none is twice


def test_files_go_with_their_caches(tmp_path: Path) -> None:
    fast = away(tiny("llama", layers=LAYERS), tmp_path)
    cache = fast(PROMPT).past_key_values
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing is left of a process that is killed
    store = cache.away.store
    assert os.fstat(store._file.fd).st_mode & 0o777 == 0o600
    ring = cache.away.ring
    del cache
    gc.collect()
    fast.fxopt.release()
    ring._reader.join(0.0)
    reader = ring._reader
    del ring, fast
    gc.collect()
    reader.join(30)
    assert not reader.is_alive()
    assert store._file.is_closed


def test_a_cache_that_cannot_be_split_is_as_it_was(tmp_path: Path) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    one = away(model, tmp_path, resident=1.0).fxopt.engine.new_cache(1).buffers.nbytes
    fast = away(model, tmp_path, resident=None, budget=2 * one)
    cache = fast(PROMPT).past_key_values
    with pytest.raises(InvalidRequestError, match=r"offload_kv, in a cache for a batch of 64: budget="):
        cache.batch_repeat_interleave(64)
    assert fast.fxopt.engine.new_cache(1).buffers is not cache.buffers
    expected = model(torch.cat([PROMPT, PROMPT[:, :2]], dim=1)).logits[:, -2:]
    assert torch.allclose(fast(PROMPT[:, :2], past_key_values=cache).logits, expected, atol=1e-4)


def test_a_cache_may_go_while_the_counters_are_held(tmp_path: Path) -> None:
    """The collector calls what gives buffers back, in whatever thread and at whatever time."""
    fast = away(tiny("llama", layers=LAYERS), tmp_path)
    cache = fast(PROMPT).past_key_values
    with fast.fxopt.engine.row_streams.tally._lock:
        del cache
        gc.collect()
    assert torch.equal(tokens(fast), tokens(tiny("llama", layers=LAYERS)))


def test_beams_are_counted(tmp_path: Path) -> None:
    fast = away(tiny("llama", layers=LAYERS), tmp_path)
    fast.generate(PROMPT, max_new_tokens=NEW, num_beams=3, do_sample=False)
    rows = 3 * (PROMPT.shape[1] + NEW) * row_bytes(fast) * len(AWAY)
    assert fast.fxopt.stats["cache bytes stored"] > 4 * rows


def test_idle_files_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", layers=LAYERS)
    fast = away(model, tmp_path)
    idle = fast(PROMPT).past_key_values.buffers
    gc.collect()
    reserve = row_file.reserve

    def with_room_when_it_is_gone(fd: int, nbytes: int) -> None:
        if idle.is_usable:
            raise OSError(28, "No space left on device")
        reserve(fd, nbytes)

    monkeypatch.setattr(row_file, "reserve", with_room_when_it_is_gone)
    assert torch.equal(tokens(fast, 2), tokens(model, 2))


# What can go wrong


@pytest.fixture
def fast(tmp_path: Path) -> Any:
    return away(tiny("llama", layers=LAYERS), tmp_path)


def several(steps: int, fast: Any, cache: Any) -> None:
    for _ in range(steps):
        fast(PROMPT[:, :1], past_key_values=cache)


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    model: Any = tiny("llama", layers=LAYERS)
    addresses = [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr(row_file, "reserve", full)
    for verify in ("off", "final"):
        with pytest.raises(StoreError, match=r"there is no room in .* for a cache of .*No space left.*max_len"):
            away(model, tmp_path, verify=verify, more={"offload_weights": {"folder": str(tmp_path)}})
    assert [p.data_ptr() for p in model.parameters()] == addresses
    monkeypatch.undo()
    fast = away(model, tmp_path)
    held = fast(PROMPT).past_key_values
    monkeypatch.setattr(row_file, "reserve", full)
    with pytest.raises(StoreError, match="there is no room"):
        tokens(fast)
    monkeypatch.undo()
    assert torch.equal(tokens(fast), tokens(model))
    del held


def test_rows_that_cannot_be_written_are_an_error_until_a_new_cache(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fast(PROMPT).past_key_values
    cache.away.ring.settle()

    def failing(*given: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(StoreError, match=r"could not be written \(Input/output error\).*with a new cache"):
        several(3, fast, cache)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(StoreError, match="could not be written"):
            fast(PROMPT[:, :1], past_key_values=cache)
    with pytest.raises(StoreError, match="could not be written"):
        copy.deepcopy(cache)
    cache.reset()
    assert torch.equal(fast(PROMPT, past_key_values=cache).logits, fast(PROMPT).logits)


def test_a_file_that_is_cut_short(fast: Any) -> None:
    cache = fast(PROMPT).past_key_values
    cache.away.ring.settle()
    os.truncate(cache.away.store._file.fd, 1000)
    with pytest.raises(StoreError, match=r"the file with the cache ends at byte .* a new cache"):
        several(3, fast, cache)


def test_ctrl_c_in_the_middle_of_a_step(fast: Any) -> None:
    expected = fast(PROMPT[:, :2], past_key_values=fast(PROMPT).past_key_values).logits
    cache = fast(PROMPT).past_key_values
    ring = cache.away.ring
    wait, turns = ring.wait, iter(range(100))

    def interrupted() -> int:
        if next(turns) == 2:
            raise KeyboardInterrupt
        slot: int = wait()
        return slot

    ring.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        fast(PROMPT[:, :2], past_key_values=cache)
    ring.wait = wait
    cache.rewind(PROMPT.shape[1])
    assert torch.equal(fast(PROMPT[:, :2], past_key_values=cache).logits, expected)


def test_a_forked_process_is_told(fast: Any) -> None:
    cache = fast(PROMPT).past_key_values
    cache.away.ring.settle()
    child = os.fork()
    if child == 0:
        try:
            fast(PROMPT[:, :1], past_key_values=cache)
        except StoreError as error:
            os._exit(7 if "forked" in str(error) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compile": "whole"}, r"offload_kv cannot be applied: .*the graph is one piece .*ask for compile=\"layer\""),
        ({"backend": "eager"}, r"the graph is one piece .*backend='eager'"),
        ({"passes": {"offload_kv": {"budget": 1000}}}, "budget=1000 B holds less than what always stays .*at least"),
        ({"passes": {"offload_kv": {"budget": "40kB"}}, "max_batch": 8}, r"in a cache for a batch of 8: budget="),
        ({"passes": {"offload_kv": {"budget": "much"}}}, "budget='much' is no number of bytes"),
        ({"passes": {"offload_kv": {"budget": 9, "resident": 0.5}}}, "give either a budget"),
        ({"passes": {"offload_kv": {"store": "tape"}}}, "store='tape' is not one of disk, cpu"),
        ({"passes": {"offload_kv": {"folder": "/none"}}}, "a cache cannot be put into /none .*give a folder"),
    ],
)
def test_requests_that_cannot_be_served(options: dict[str, Any], sentence: str) -> None:
    ways = {"backend": "aot_eager", "compile": "layer", "passes": {"offload_kv": {}}, **options}
    with pytest.raises((InvalidRequestError, StoreError), match=sentence):
        fxopt.optimize(tiny("llama", layers=4), 64, **ways)


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(StoreError, match=r"a cache cannot be put into .*Permission denied.*give a folder"):
        away(tiny("llama", layers=LAYERS), tmp_path)


def test_layers_that_cannot_be_told_apart() -> None:
    with pytest.raises(RewriteError, match=r"offload_kv cannot be applied: .*layers cannot be told apart"):
        away(tiny("llama", layers=2))


def test_it_is_not_saved(fast: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be saved yet; leave offload_kv out"):
        fast.fxopt.save(tmp_path / "saved")


# The report


def test_the_report_says_who_waits_for_what(fast: Any) -> None:
    tokens(fast)
    report = fast.fxopt.report
    text = str(report)
    assert [spot.layer for spot in report["offload_kv"].sites] == list(AWAY)
    assert "cache: 4 of 6 layers are streamed from disk" in text
    assert "layer 1: resident" in text
    assert "layer 0: wait for its rows, run, store the new ones, read layer 3 into the slot" in text
    assert report.streamed_cache.measured["decode"].count == NEW - 1
    assert report.streamed_cache.predicted.moved == len(AWAY) * report.streamed_cache.context * row_bytes(fast)
    assert report.to_dict()["streamed_cache"]["placement"]["offloaded"] == AWAY
    report.to_json()
    page = as_page(report)
    assert '<figure data-stage="offload_kv"><svg' in page
    assert "A decode step: the cache of one sequence" in page


def test_the_diff_shows_waits_stores_and_reads(fast: Any) -> None:
    report = fast.fxopt.report
    made = [line.text for line in report["offload_kv"].listing if line.made_by == ("offload_kv",)]
    ahead = {0: 3, 2: 5, 3: 0, 5: 2}
    assert made == [
        line
        for layer, other in ahead.items()
        for line in (f"wait(layer_{layer}.rows)", f"store(layer_{layer}.rows)", f"prefetch(layer_{other}.rows)")
    ]
    changed = [line for line in report.diff("offload_kv").splitlines() if line.startswith(("+", "-"))]
    assert changed[:3] == [f"+ {line}" for line in made[:3]]
    assert not [line for line in changed if line.startswith("-")]


# A real model


@pytest.mark.slow
@pytest.mark.skipif(not is_demo_installed(), reason="the extra demo is not installed")
@pytest.mark.parametrize("what", [("offload_weights",), ("offload_kv",), ("offload_weights", "offload_kv")])
def test_tokens_of_smollm2(what: tuple[str, ...], tmp_path: Path) -> None:
    model, tokenizer = load_model("demo", torch.float32)
    prompt = tokenizer("The oldest rivers are those that", return_tensors="pt").input_ids
    want = model.generate(prompt, max_new_tokens=12, do_sample=False)
    offload = {"resident": 0.5, "folder": str(tmp_path)}
    ways: Any = {"backend": "aot_eager", "compile": "layer", "verify": "off", "chunk": 32}
    fast = fxopt.optimize(model, 64, **ways, passes={name: offload for name in what})
    assert torch.equal(fast.generate(prompt, max_new_tokens=12, do_sample=False), want)
    read = {"offload_weights": "weight bytes read", "offload_kv": "cache bytes read"}
    assert all(fast.fxopt.stats[read[name]] for name in what)
