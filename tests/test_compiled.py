"""Through Inductor: nothing compiles twice, nothing copies a cache, a real model says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import VOCABULARY, tiny
from fxopt.in_place import prove_in_place

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    stock = tiny("llama", num_hidden_layers=3)
    return stock, fxopt.optimize(stock, max_len=128, chunk=32, strict=True)


def test_llama_counts_and_proof(pair: tuple[Any, Any]) -> None:
    """2 x layers, 1 x layers, and 0 cache-sized copies."""
    report = pair[1].fxopt.report.to_dict()
    rows = {row["name"]: row for row in report["stages"]}
    expected = {"static_kv": 6, "fuse_qkv": 3, "fuse_gate_up": 3, "grouped_attention": 3, "decode_attention": 3}
    assert {name: (rows[name]["expected"], rows[name]["matched"]) for name in expected} == {
        name: (count, count) for name, count in expected.items()
    }
    assert rows["matvec"]["matched"] == rows["matvec"]["expected"] == 4 * 3 + 1
    assert {name: (p["copies"], p["writes"]) for name, p in report["proofs"].items()} == {
        "prefill": ((), 6),
        "decode": ((), 6),
    }


def test_nothing_compiles_for_new_lengths(pair: tuple[Any, Any]) -> None:
    """20 prompt lengths, each generated to max_len, on what optimize has compiled."""
    stock, fast = pair
    fast.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False, pad_token_id=0)
    counters.clear()
    compiled = {name: n for name, n in fast.fxopt.stats.items() if name.startswith("compiled")}
    for length in range(2, 122, 6):
        tokens = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
        options: dict[str, Any] = {"max_length": 128, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert fast.generate(tokens, **options).tolist() == stock.generate(tokens, **options).tolist()
    assert {name: n for name, n in fast.fxopt.stats.items() if name.startswith("compiled")} == compiled
    assert not counters["inductor"]
    assert not counters["aot_autograd"]
    assert not counters["frames"]


def test_batches_of_any_size_compile_once(pair: tuple[Any, Any]) -> None:
    stock, fast = pair
    for batch in (2, 3, 5, 2):
        tokens = torch.randint(3, VOCABULARY, (batch, 40), generator=torch.Generator().manual_seed(batch))
        found = fast.generate(tokens, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert found.tolist() == stock.generate(tokens, max_new_tokens=10, do_sample=False, pad_token_id=0).tolist()
    assert fast.fxopt.stats["compiled decode for two sequences or more"] == 1


def test_the_proof_sees_a_copy(pair: tuple[Any, Any]) -> None:
    """The check itself can fail: the text of a graph that clones one window of a buffer."""
    facts = pair[1].fxopt.engine.facts
    heads, dim = facts.layers[0].key_heads, facts.layers[0].key_dim
    line = f'    clone_3: "f32[1, {heads}, s9, {dim}][1, 2, 3, 4]cpu" = torch.ops.aten.clone.default(slice_1)'
    proof = prove_in_place(line, facts, batch=1, window="s9")
    assert not proof.holds
    assert "clone_3" in proof.copies[0]
    assert prove_in_place(line, facts, batch=1, window="s1").holds  # as many tokens of this step are no cache


def test_expanded_heads_are_a_copy_that_the_proof_names() -> None:
    """Without the pass that takes them out, Inductor writes K and V of the window out for every group."""
    passes = {"grouped_attention": False, "decode_attention": False}
    fast: Any = fxopt.optimize(tiny("llama", num_hidden_layers=1), max_len=128, passes=passes, verify="off")
    proof = fast.fxopt.report.proofs["decode"]
    assert not proof.holds
    assert len(proof.copies) == 2


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_model("demo", torch.float32)


def test_smollm2_says_the_same(smollm2: Any) -> None:
    model, tokenizer = smollm2
    torch._dynamo.reset()
    fast: Any = fxopt.optimize(model, max_len=256, strict=True)
    rows = {row["name"]: row for row in fast.fxopt.report.to_dict()["stages"]}
    assert (rows["static_kv"]["matched"], rows["fuse_qkv"]["matched"], rows["matvec"]["matched"]) == (60, 30, 121)
    inputs = tokenizer("Once upon a time, in a land of compilers,", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False}
    assert fast.generate(**inputs, **options).tolist() == model.generate(**inputs, **options).tolist()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_peak_memory(backend: str) -> None:
    """Weights and buffers plus 10 %, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / "peak_memory.py"), "--layers", "12", "--backend", backend]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ratio = float(text.rsplit("=", 1)[1])
    assert ratio <= 1.10, text
