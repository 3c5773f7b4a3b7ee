"""Several tokens a step: guesses from the prompt or from a smaller model, checked by the model in one go.

python examples/assisted_decoding.py                                   # prompt lookup: no second model
python examples/assisted_decoding.py --model BIG --draft SMALL         # two models with one vocabulary

Greedy answers stay what they are, whoever guesses. What pays is text that repeats itself or its prompt.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from tabulate import tabulate

import fxopt
from fxopt.demo_model import load_model

PROMPT = (
    "Q: Name the months of the year.\n"
    "A: January, February, March, April, May, June, July, August, September, October, November, December.\n"
    "Q: Name the months of the year again.\n"
    "A:"
)


def steps(fast: Any) -> int:
    """How often the model ran so far: over a prompt, for one token, or to check guesses."""
    return sum(fast.fxopt.stats[kind] for kind in ("prefill", "decode", "verify", "score"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft", help="a smaller model with the same vocabulary")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--new", type=int, default=60)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, torch.float32)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    limits: dict[str, Any] = {"max_len": inputs.input_ids.shape[1] + arguments.new, "max_batch": 1}
    fast = fxopt.optimize(model, **limits, backend=arguments.backend)

    ways: dict[str, dict[str, Any]] = {"one by one": {}, "prompt lookup": {"prompt_lookup_num_tokens": 5}}
    if arguments.draft:
        draft, _ = load_model(arguments.draft, torch.float32)
        ways["draft model"] = {"assistant_model": fxopt.optimize(draft, **limits, backend=arguments.backend)}

    rows, answers = [], []
    for name, options in ways.items():
        options |= {"max_new_tokens": arguments.new, "do_sample": False}
        fast.generate(**inputs, **options)  # graphs that this way alone needs are compiled here
        before, began = steps(fast), time.perf_counter()
        answers.append(fast.generate(**inputs, **options))
        rows.append([name, steps(fast) - before, time.perf_counter() - began])
    print(tokenizer.decode(answers[0][0]))
    print(tabulate(rows, ["guesses", "steps of the model", "seconds"], floatfmt=".3f"))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


if __name__ == "__main__":
    main()
