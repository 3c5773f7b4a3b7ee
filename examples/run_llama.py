"""One way of generating, timed: run it twice and compare tokens per second, memory and hash.

python examples/run_llama.py --model llama-7b --dtype float16                                   # stock Transformers
python examples/run_llama.py --model llama-7b --dtype float16 --preallocate --compile dynamic   # fxopt

Without --preallocate the model is the stock one: as it is, with a static cache and torch.compile (static), with the
growing cache and torch.compile (dynamic), or with a static cache and no graph break allowed (fullgraph).
With --preallocate it is what fxopt makes of it: the rewritten graphs run as they are (no), compiled for one shape,
so that attention reads the whole cache (static), compiled for every window of the cache (dynamic), or so and with all
layers as one graph (fullgraph). "fxopt bench" runs all of them in turns, which is what ratios should be taken from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from tabulate import tabulate

from fxopt.admission import select
from fxopt.bench.configs import CONFIGS
from fxopt.bench.contender import Contender
from fxopt.bench.figures import Figures
from fxopt.bench.job import Job, run
from fxopt.bench.measuring import Effort
from fxopt.bench.ours import Ours
from fxopt.bench.pictures import drawing
from fxopt.bench.results import Results
from fxopt.bench.series import Series
from fxopt.bench.setting import settings
from fxopt.bench.source import Source
from fxopt.bench.stock import DynamicCompiled, StaticCompiled, StockEager
from fxopt.bench.table import number
from fxopt.bench.traces import Traces

BATCH_SIZES = [1]
PROMPT_LENGTHS = [1000]
NEW_TOKENS = [200]
SWEEPS = {"batch": [1, 2, 4, 8], "length": [500, 1000, 4000]}
COLUMNS: dict[str, Callable[[Figures], object]] = {
    "batch_size": lambda one: one.setting.batch,
    "prompt_length": lambda one: one.setting.prompt,
    "new_tokens": lambda one: one.setting.new,
    "cache_length": lambda one: one.setting.max_len,
    "tok_per_s": lambda one: number(one.tok_s, ".3f"),
    "max_mem_mb": lambda one: number(one.peak_mb, ".2f"),
    "hash": lambda one: one.text_hash or one.trouble,
}
WAYS = ("no", "static", "dynamic", "fullgraph")


def contender(preallocate: bool, compile: str) -> Contender:
    if preallocate:
        passes = select({"window_kv": False} if compile == "static" else None)
        backend = "eager" if compile == "no" else "inductor"
        return Ours("fxopt", passes, backend, "whole" if compile == "fullgraph" else "auto")  # type: ignore[arg-type]
    if compile == "no":
        return StockEager()
    return DynamicCompiled() if compile == "dynamic" else StaticCompiled(fullgraph=compile == "fullgraph")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(CONFIGS)
    parser.add_argument("--model", default="demo", help=f"a folder or name, demo, or random weights as in {known}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--preallocate", action="store_true", help="rewrite the model with fxopt")
    parser.add_argument("--compile", default="no", choices=WAYS)
    parser.add_argument("--profile", action="store_true", help="a trace of a short run for TensorBoard, in ./tb_logs")
    parser.add_argument("--sweep", choices=tuple(SWEEPS), help=", ".join(f"{k}: {v}" for k, v in SWEEPS.items()))
    parser.add_argument("--prompt", type=int, nargs="+", default=PROMPT_LENGTHS)
    parser.add_argument("--new", type=int, nargs="+", default=NEW_TOKENS)
    options = parser.parse_args()
    batches = SWEEPS["batch"] if options.sweep == "batch" else BATCH_SIZES
    prompts = SWEEPS["length"] if options.sweep == "length" else options.prompt
    wanted = settings(batches, prompts, options.new)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = Source(options.model, options.model in CONFIGS, getattr(torch, options.dtype), device)

    def shown(results: Results) -> str:
        rows = [[options.compile, *(cell(one) for cell in COLUMNS.values())] for one in results.figures]
        table = tabulate(rows, ["compile", *COLUMNS], "github", disable_numparse=True)
        return f"{results.model}, {results.dtype}\n{results.machine}\n\n{table}"

    return run(
        Job(
            source,
            [Series(wanted)],
            lambda: [contender(options.preallocate, options.compile)],
            Effort(),
            shown,
            drawing(wanted),
            traces=Traces() if options.profile else None,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
