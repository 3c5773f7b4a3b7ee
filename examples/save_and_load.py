"""Optimise once, save, and start from the folder ever after.

python examples/save_and_load.py                 # SmolLM2-135M, compiled by Inductor
python examples/save_and_load.py --tiny          # a tiny random model, in seconds
python examples/save_and_load.py --folder DIR    # keep what is saved, and start from it the next time
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import tiny

MAX_LEN = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        tokens, seconds = first_tokens(arguments.tiny, arguments.folder)
        print(f"{seconds:.2f} s to the first tokens: {tokens}")
        return
    with tempfile.TemporaryDirectory() as folder:
        once, fresh = first_tokens(arguments.tiny, Path(folder) / "model")
        again, loaded = first_tokens(arguments.tiny, Path(folder) / "model")
    assert once == again
    print(f"first tokens after {fresh:.2f} s, and from the folder after {loaded:.2f} s: {again}")


def first_tokens(is_tiny: bool, folder: Path) -> tuple[list[int], float]:
    """Four tokens, and how long they took to come once the model was there."""
    model, prompt = stock(is_tiny)
    started = time.perf_counter()
    if folder.exists():
        fast = fxopt.load(folder, model, expected={"max_len": MAX_LEN})
    else:
        fast = fxopt.optimize(model, max_len=MAX_LEN, backend="eager" if is_tiny else "inductor")
    output = fast.generate(prompt, max_new_tokens=4, do_sample=False)
    seconds = time.perf_counter() - started
    if not folder.exists():
        fast.fxopt.save(folder)
    return output[0, prompt.shape[1] :].tolist(), seconds


def stock(is_tiny: bool) -> tuple[Any, torch.Tensor]:
    if is_tiny:
        return tiny("llama"), torch.arange(3, 13)[None]
    model, tokenizer = load_model("demo", torch.float32)
    return model, tokenizer("The three laws of robotics are", return_tensors="pt").input_ids


if __name__ == "__main__":
    main()
