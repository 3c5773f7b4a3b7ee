"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from words import word_tokenizer

from fxopt.families import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"

TINY = "{tiny}"  # stands for a folder with a tiny model and its tokenizer
QUICK = ["--model", TINY, "--backend", "eager"]
TYPED = "w5 w6\nw7 w8 w9\n"

#: What to run each example with, to be quick, and what its output must hold.
RUNS = {
    "quickstart.py": (["--tiny"], "static_kv"),
    "write_a_pass.py": ([], "wrong_norm was dropped"),
    "plan_memory.py": (["--svg", f"{TINY}/plan.svg"], "operators compared, 0 differ"),
    "peak_memory.py": (["--layers", "2", "--backend", "eager"], "peak / (weights + KV buffers)"),
    "resident_memory.py": (
        ["--layers", "3", "--hidden", "72", "--max-len", "600"],
        "planned / Inductor's peak: ",
    ),
    "offload_weights.py": (
        ["--layers", "4", "--hidden", "64", "--budget", "1200kB", "--backend", "aot_eager", "--new", "3"],
        "the same tokens; 1 MiB read per token",
    ),
    "offload_kv.py": (
        ["--layers", "4", "--tokens", "64", "--chunk", "16", "--budget", "2MiB", "--backend", "aot_eager"],
        "the same tokens",
    ),
    "kv_traffic.py": (["--tiny", "--max-len", "256", "--filled", "100"], "4.9x less"),
    "kv_perplexity.py": (
        ["--model", TINY, "--tokens", "256", "--window", "128", "--new", "8", "--formats", "int4", "weights-int4"],
        "weights-int4",
    ),
    "kv_speed.py": (
        [
            *("--tiny", "--max-len", "64", "--filled", "40", "--steps", "2", "--rounds", "2", "--backend", "eager"),
            *("--formats", "int4", "weights-int8"),
        ],
        "40             weights-int8",
    ),
    "run_llama.py": (
        ["--model", "tiny", "--preallocate", "--compile", "no", "--prompt", "8", "16", "--new", "4"],
        "| 1            | 16              | 4            | 20             |",
    ),
    "cold_start.py": (["--layers", "2", "4", "--backend", "eager"], "of the time of the first"),
    "decode_loop.py": (
        ["--tiny", "--backend", "eager", "--max-len", "64", "--prompt", "8", "--new", "4", "--rounds", "1"],
        "Transformers' loop",
    ),
    "chat.py": ([*QUICK, "--max-len", "64", "--new", "4"], "13 tokens of prompt, 7 of them were in the cache"),
    "streaming.py": ([*QUICK, "--prompt", "w5 w6 w7", "--new", "8"], "first words after"),
    "assisted_decoding.py": ([*QUICK, "--draft", TINY, "--prompt", "w5 w6 w7", "--new", "8"], "draft model"),
    "save_and_load.py": (["--tiny"], "and from the folder after"),
    "torch_compile_backend.py": (["--tiny", "--backend", "aot_eager"], "fuse_qkv: 2 rewritten"),
    "text_generation_pipeline.py": ([*QUICK, "--new", "4", "w5 w6 w7", "w8 w9"], "the stock pipeline says the same"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    for part in (tiny("llama"), word_tokenizer()):
        part.save_pretrained(path)
    return path


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, folder: Path) -> None:
    arguments, expected = RUNS[name]
    command = [sys.executable, str(EXAMPLES / name), *(argument.replace(TINY, str(folder)) for argument in arguments)]
    done = subprocess.run(command, input=TYPED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
