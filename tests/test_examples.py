"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

#: What to run each example with, to be quick, and what its output must hold.
RUNS = {
    "quickstart.py": (["--tiny"], "static_kv"),
    "write_a_pass.py": ([], "wrong_norm was dropped"),
    "peak_memory.py": (["--layers", "2", "--backend", "eager"], "peak / (weights + KV buffers)"),
    "decode_speed.py": (
        ["--backend", "eager", "--no-static", "--new", "2", "--rounds", "1", "--prompt", "8"],
        "stock eager",
    ),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str) -> None:
    arguments, expected = RUNS[name]
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
