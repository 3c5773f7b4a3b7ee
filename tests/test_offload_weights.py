"""The pass ``offload_weights``: the same tokens from slots, what is read, where weights lie, and every refusal."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_limits import at_most
from offload_weights import make, run
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

import fxopt
from fxopt import ArtifactError, InvalidRequestError, RewriteError
from fxopt.admission import select
from fxopt.families import VOCABULARY, tiny
from fxopt.layer_weights import layer_weights
from fxopt.offload import StoreError
from fxopt.offload.folders import PREFIX
from fxopt.pipeline import Pipeline, Policy
from fxopt.request import Request

PROMPT = torch.arange(3, 23)[None]
NEW, LAYERS = 8, 6
PAGE = Path(__file__).parent.parent / "docs" / "offload.md"


def tokens(model: Any, batch: int = 1) -> Tensor:
    found: Tensor = model.generate(PROMPT.repeat(batch, 1), max_new_tokens=NEW, do_sample=False)
    return found


def streamed(model: Any, tmp_path: Path | None = None, **offload: Any) -> Any:
    if tmp_path is not None:
        offload["folder"] = str(tmp_path)
    ways: Any = {"max_len": 64, "chunk": 16, "backend": "aot_eager", "compile": "layer", "verify": "off"}
    return fxopt.optimize(model, **ways, passes={"offload_weights": {"resident": 0.25, **offload}})


def layer_bytes(model: Any) -> list[int]:
    return [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny("llama", layers=LAYERS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# The same tokens


@pytest.mark.parametrize(
    ("family", "dtype", "store", "depth"),
    [
        ("llama", torch.float32, "disk", 1),
        ("llama", torch.bfloat16, "cpu", 2),
        ("gemma2", torch.float32, "cpu", 3),
        ("gemma2", torch.bfloat16, "disk", 4),
        ("mixtral", torch.float32, "disk", 2),
        ("mixtral", torch.bfloat16, "cpu", 1),
        ("llama", torch.float32, "disk", None),
    ],
)
def test_tokens_and_bytes(family: str, dtype: torch.dtype, store: str, depth: int | None, tmp_path: Path) -> None:
    model: Any = tiny(family, dtype, layers=LAYERS)
    sizes, state = layer_bytes(model), {name: p.clone() for name, p in model.state_dict().items()}
    stock = {batch: tokens(model, batch) for batch in (1, 3)}
    fast = streamed(model, tmp_path, store=store, depth=depth)
    for batch in (1, 3, 1):
        assert torch.equal(tokens(fast, batch), stock[batch])
    assert torch.equal(tokens(model), stock[1])  # slower, but as before
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())

    use = fast.fxopt.report.streams
    assert use.placement.offloaded == (0, 2, 3, 5)
    assert use.placement.slots == (depth or 2)
    cache = fast(PROMPT).past_key_values
    before = settled(fast)
    for _ in range(3):
        fast(PROMPT[:, :1], past_key_values=cache)
    assert settled(fast) - before == 3 * sum(sizes[layer] for layer in use.placement.offloaded)


def settled(fast: Any) -> int:
    """The bytes that the store has read, when it has read what it was asked for."""
    fast.fxopt.engine.ring.settle()
    found: int = fast.fxopt.engine.ring._work.store.bytes_read
    return found


@pytest.mark.slow
def test_compiled_verified_and_in_an_arena(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    offload = {"budget": 700_000, "folder": str(tmp_path)}
    fast = fxopt.optimize(
        model, 64, chunk=16, compile="layer", max_batch=2, passes={"plan_memory": True, "offload_weights": offload}
    )
    for batch in (1, 2):
        assert torch.equal(tokens(fast, batch), tokens(tiny("llama", layers=LAYERS), batch))
    report = fast.fxopt.report
    assert report["offload_weights"].matched == len(report.streams.placement.offloaded) > 0
    assert report.streams.placement.device_bytes <= 700_000
    assert fast.fxopt.arena_bytes > 0


def test_assisted_beams_and_threads(tmp_path: Path) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    ways: list[dict[str, Any]] = [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {}]
    stock = [model.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **way) for way in ways]
    fast = streamed(model, tmp_path)
    for way, expected in zip(ways, stock, strict=True):
        assert torch.equal(fast.generate(PROMPT, max_new_tokens=NEW, do_sample=False, **way), expected)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(tokens(fast))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(one, stock[-1]) for one in found)


# Where weights lie


def test_a_layer_owns_its_weights_and_what_is_shared_stays() -> None:
    model: Any = tiny("gpt2", layers=4)  # its head is its embedding
    pipeline = Pipeline(select(None), Request(64, compile="layer").captured(model), Policy())
    pipeline.run()
    layers = layer_weights(pipeline.program, model)
    assert layers is not None
    named = {id(p): name for name, p in model.named_parameters()}
    for number, groups in enumerate(layers):
        found = {named[id(one.tensor)] for group in groups for one in group}
        assert found == {name for name in named.values() if name.startswith(f"transformer.h.{number}.")}


def test_weights_are_in_a_private_file_and_nowhere_else(tmp_path: Path) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    old = [StorageWeakRef(p.untyped_storage()) for p in model.model.layers[0].parameters()]
    fast = streamed(model, tmp_path)
    (folder,) = tmp_path.glob(f"{PREFIX}*")
    file = folder / "weights.safetensors"
    assert file.stat().st_mode & 0o777 == 0o600
    moved = [p for layer in (0, 2, 3, 5) for p in model.model.layers[layer].parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in moved}
    assert list(storages.values()) == [file.stat().st_size]
    gc.collect()
    assert all(storage.expired() for storage in old)
    assert fast.fxopt.report.streams.written == sum(p.nbytes for p in moved)

    stock = tokens(tiny("llama", layers=LAYERS))
    del fast
    gc.collect()
    assert list(tmp_path.glob(f"{PREFIX}*")) == []  # gone with the fast model; the stock one still has its weights
    assert torch.equal(tokens(model), stock)


def test_files_of_the_model_are_read_in_place(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    stock, before = tokens(model), (checkpoint / "model.safetensors").read_bytes()
    fast = streamed(model, tmp_path)
    use = fast.fxopt.report.streams
    assert use.in_place > 0
    q_k_v = [
        getattr(model.model.layers[layer].self_attn, f"{kind}_proj").weight for layer in (0, 2, 3, 5) for kind in "qkv"
    ]
    assert use.written == sum(p.nbytes for p in q_k_v)  # they do not lie behind each other in the file
    assert torch.equal(tokens(fast), stock)
    assert torch.equal(tokens(model), stock)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_weights_that_changed_since_they_were_loaded_are_not_read_in_place(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1.5)
    stock = tokens(model)
    fast = streamed(model, tmp_path)
    assert torch.equal(tokens(fast), stock)
    down = sum(model.model.layers[layer].mlp.down_proj.weight.nbytes for layer in (0, 2, 3, 5))
    assert fast.fxopt.report.streams.written >= down


def test_what_fits_is_left_where_it_is(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    fast = streamed(model, tmp_path, budget="1GiB", resident=None)
    assert (fast.fxopt.report["offload_weights"].matched, fast.fxopt.report.streams) == (0, None)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(tokens(fast), tokens(model))


# Weights that are updated


def test_an_update_in_place_is_followed(tmp_path: Path) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    fast = streamed(model, tmp_path)
    tokens(fast)
    other: Any = tiny("llama", layers=LAYERS)
    for one in (model, other):
        with torch.no_grad():
            for layer in one.model.layers:
                layer.mlp.down_proj.weight.mul_(-1.5)
                layer.self_attn.q_proj.weight.add_(0.25)
    expected = tokens(other)
    assert not torch.equal(tokens(tiny("llama", layers=LAYERS)), expected)
    assert torch.equal(tokens(fast), expected)


@pytest.mark.parametrize("store", ["disk", "cpu"])
def test_an_update_past_the_count_of_updates_gives_no_wrong_tokens(store: str, tmp_path: Path) -> None:
    model, other = (tiny("llama", layers=LAYERS) for _ in range(2))
    fast = streamed(model, tmp_path, store=store)
    tokens(fast)
    time.sleep(0.02)
    for one in (model, other):
        for layer in one.model.layers:
            layer.mlp.down_proj.weight.data.mul_(-1.5)
    if store == "cpu":
        assert torch.equal(tokens(fast), tokens(other))
    else:
        with pytest.raises(StoreError, match=r"another process or through parameter\.data"):
            tokens(fast)


def test_an_update_of_what_lies_in_the_models_own_file_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    fast = streamed(model, tmp_path)
    tokens(fast)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(StoreError, match=r"down_proj.weight was updated in place, and it is read from .*safetensors"):
        tokens(fast)


# What can go wrong


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda path: os.truncate(path, 4096),
            "had .* bytes and has 4,096 now|ends at byte .*in the middle of a layer",
        ),
        (lambda path: path.open("r+b").write(b"x"), "was written to while weights were read from it"),
    ],
    ids=["cut short", "written to"],
)
def test_a_file_that_changes_while_it_runs(harm: Any, sentence: str, checkpoint: Path, tmp_path: Path) -> None:
    fast = streamed(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    tokens(fast)
    time.sleep(0.02)
    harm(checkpoint / "model.safetensors")
    for _ in range(2):
        with pytest.raises(StoreError, match=sentence):
            tokens(fast)


def test_a_disk_without_room_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama", layers=LAYERS)
    addresses = [p.data_ptr() for p in model.model.layers[0].mlp.parameters()]
    stock, whole = tokens(model), os.write

    def full(fd: int, data: Any) -> int:
        if len(data) > 4096:
            raise OSError(28, "No space left on device")
        return whole(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match=r"could not be written to .*No space left on device.*the model is as it was"):
        streamed(model, tmp_path)
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert [p.data_ptr() for p in model.model.layers[0].mlp.parameters()] == addresses
    assert torch.equal(tokens(model), stock)


def test_ctrl_c_in_the_middle_of_a_step(tmp_path: Path) -> None:
    model = tiny("llama", layers=LAYERS)
    stock = tokens(model)
    fast = streamed(model, tmp_path)
    ring = fast.fxopt.engine.ring
    wait, turns = ring.wait, iter(range(100))

    def interrupted() -> int:
        if next(turns) == 6:
            raise KeyboardInterrupt
        slot: int = wait()
        return slot

    ring.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        tokens(fast)
    ring.wait = wait
    assert torch.equal(tokens(fast), stock)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compile": "whole"}, r"the graph is one piece .*ask for compile=\"layer\""),
        ({"backend": "eager"}, r"the graph is one piece .*backend='eager'"),
        (
            {"passes": {"offload_weights": {"budget": 1000}}},
            "budget=1000 B holds less than what always stays .*at least",
        ),
        ({"passes": {"offload_weights": {"budget": "much"}}}, "budget='much' is no number of bytes"),
        ({"passes": {"offload_weights": {"budget": 9, "resident": 0.5}}}, "give either a budget"),
        ({"passes": {"offload_weights": {"resident": 2}}}, "resident=2 is no share"),
        ({"passes": {"offload_weights": {"depth": 0}}}, "depth=0 is too small"),
        ({"passes": {"offload_weights": {"store": "tape"}}}, "store='tape' is not one of disk, cpu"),
        ({"passes": {"offload_weights": {"folder": "/none"}}}, "weights cannot be put into /none .*give a folder"),
    ],
)
def test_requests_that_cannot_be_served(options: dict[str, Any], sentence: str) -> None:
    ways = {"backend": "aot_eager", "compile": "layer", "verify": "off", "passes": {"offload_weights": {}}, **options}
    with pytest.raises((InvalidRequestError, StoreError), match=sentence):
        fxopt.optimize(tiny("llama", layers=4), 64, **ways)


def test_layers_that_cannot_be_told_apart() -> None:
    with pytest.raises(RewriteError, match="its layers cannot be told apart"):
        streamed(tiny("llama", layers=2))


def test_what_is_streamed_is_not_saved(tmp_path: Path) -> None:
    fast = streamed(tiny("llama", layers=LAYERS), tmp_path)
    with pytest.raises(ArtifactError, match="cannot be saved yet; leave offload_weights out"):
        fast.fxopt.save(tmp_path / "saved")


# More than the memory


@pytest.mark.slow
def test_a_process_with_less_memory_than_the_weights(tmp_path: Path) -> None:
    """1.2 GB of weights, 300 MiB for them, and a process that is killed if it takes more than 1 GiB for everything."""
    make(str(tmp_path), layers=20, hidden=1024, dtype=torch.float32)
    arguments = ["--budget", "300MiB", "--backend", "aot_eager", "--new", "4"]
    stock = run(arguments, "stock", str(tmp_path))
    assert stock["generating"] > stock["weights"] > 1.1 * 2**30
    with at_most(2**30) as within:
        found = run(arguments, "streamed", str(tmp_path), within)
    assert found["tokens"] == stock["tokens"]
    assert found["anonymous"] < 0.75 * found["weights"]
    assert found["generating"] < 0.85 * found["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("streamed_pass", ["offload_weights", "offload_kv"])
def test_the_page_runs(streamed_pass: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (text for text in blocks if streamed_pass in text)
    prompt = torch.arange(3, 13)[None] % VOCABULARY
    model = tiny("llama", layers=4)
    model.config.max_position_embeddings = 32768  # the context of the second example
    space: dict[str, Any] = {"fxopt": fxopt, "model": model, "inputs": {"input_ids": prompt, "pad_token_id": 0}}
    exec(block, space)
    assert streamed_pass in str(space["fast"].fxopt.report)


# The report


def test_the_report_says_who_waits_for_what(tmp_path: Path) -> None:
    fast = streamed(tiny("llama", layers=LAYERS), tmp_path)
    tokens(fast)
    report, stats = fast.fxopt.report, fast.fxopt.stats
    text = str(report)
    assert [spot.layer for spot in report["offload_weights"].sites] == [0, 2, 3, 5]
    assert "weights: 4 of 6 layers are streamed from disk" in text
    assert "layer 1: resident" in text
    assert "layer 0: wait for its weights, run, read layer 3 into the slot" in text
    assert "layer 5: wait for its weights, run, read layer 2 of the next step into the slot" in text
    assert re.search(r"a decode step, predicted at .* GiB/s with 32 rows\s+filled: .* ms, .*\s+of\s+it\s+waiting", text)
    assert f"decode, measured over {NEW - 1} steps" in text
    assert report.streams.measured["decode"].count == NEW - 1
    assert report.to_dict()["streams"]["placement"]["offloaded"] == (0, 2, 3, 5)
    assert stats["layers read"] >= 4 * NEW
    assert stats["weight bytes read"] >= NEW * report.streams.placement.moved
    report.to_json()
    report.save(tmp_path / "report.html")
