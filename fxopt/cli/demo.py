"""``fxopt demo``: the optimised model beside the stock one."""

from __future__ import annotations

import argparse
import time

from tabulate import tabulate

from fxopt.cli.options import Commands, add_optimising, add_running, optimised, positive, tokenized
from fxopt.demo_model import DEMO
from fxopt.progress import Progress

PROMPT = "What is a compiler, in one paragraph?"

HELP = "optimise SmolLM2-135M and generate with it beside the stock model"


def add(commands: Commands) -> None:
    parser = commands.add_parser("demo", help=HELP, description=HELP)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=positive, default=100)
    add_optimising(parser)
    add_running(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    stock, fast, tokenizer = optimised(arguments, DEMO)
    inputs = tokenized(tokenizer, arguments.prompt, arguments.device)
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    rows, outputs, first = [], [], 0.0
    for name, model in (("stock", stock), ("fxopt", fast)):
        model.generate(**inputs, **{**options, "max_new_tokens": 4})  # warm up
        with Progress().step(f"generate with {name}"):
            started = time.perf_counter()
            outputs.append(model.generate(**inputs, **options))
            took = time.perf_counter() - started
        first = first or took
        tokens = outputs[-1].shape[1] - inputs["input_ids"].shape[1]
        rows.append([name, tokens, f"{took:.2f}", f"{tokens / took:.1f}", f"{first / took:.2f}x"])
    print(tokenizer.decode(outputs[-1][0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"\n{fast.fxopt.report}\n")
    print(tabulate(rows, headers=["model", "new tokens", "seconds", "tokens/s", "speed-up"], tablefmt="simple"))
    same = outputs[0].tolist() == outputs[1].tolist()
    print(f"\nSame tokens as the stock model: {'yes' if same else 'no'}")
    if not same:
        print("(In half precision both round, differently; run with --dtype float32 for equality.)")
    return 0 if same or arguments.dtype != "float32" else 1
