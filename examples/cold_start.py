"""How long it takes from a model to its first token, each time in a new process with nothing compiled yet.

python examples/cold_start.py                                        # a tiny llama, 6 and 48 layers deep
python examples/cold_start.py --model demo --compile whole layer     # SmolLM2-135M, compiled in two ways
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from tabulate import tabulate

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import VOCABULARY, tiny

Row = dict[str, float]


def first_token(model_name: str, layers: int, compile: Any, backend: Any) -> Row:
    """Seconds of each step of ``optimize``, and of all until the first token is there."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.set_num_threads(2)
        model: Any = load_model(model_name, torch.float32)[0] if model_name else tiny("llama", layers=layers)
        prompt = torch.arange(3, 23)[None] % VOCABULARY
        began = time.perf_counter()
        fast = fxopt.optimize(model, max_len=256, compile=compile, backend=backend)
        fast.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return {**fast.fxopt.report.seconds, "until the first token": time.perf_counter() - began}


def in_a_new_process(*arguments: Any) -> Row:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(first_token, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name for fxopt's loader, such as demo; without it a tiny random llama")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 48], help="of the tiny llama")
    parser.add_argument("--compile", nargs="+", default=["layer"], choices=("auto", "layer", "whole"))
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    depths = [0] if options.model else options.layers
    rows = {
        (options.model or f"{layers} layers", how): in_a_new_process(options.model, layers, how, options.backend)
        for layers in depths
        for how in options.compile
    }
    steps = list(dict.fromkeys(step for row in rows.values() for step in row))
    table = [[step, *(f"{row[step]:.2f}" if step in row else "" for row in rows.values())] for step in steps]
    print(tabulate(table, headers=["seconds", *(f"{name}, {how}" for name, how in rows)], disable_numparse=True))
    *_, last = table
    print(f"the last of these takes {float(last[-1]) / float(last[1]):.2f} of the time of the first")


if __name__ == "__main__":
    main()
