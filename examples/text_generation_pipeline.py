"""An optimised model inside ``pipeline``: one prompt, a padded batch, and the stock pipeline's texts.

python examples/text_generation_pipeline.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import pipeline

import fxopt
from fxopt.demo_model import load_model

PROMPTS = ["The capital of France is", "Water boils at", "A short poem about the sea:"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--new", type=int, default=20)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, torch.float32)
    tokenizer.padding_side = "left"  # answers begin where prompts end
    fast = fxopt.optimize(model, max_len=128, max_batch=len(arguments.prompts), backend=arguments.backend)

    ask: dict[str, Any] = {"max_new_tokens": arguments.new, "do_sample": False}
    stock_pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)
    fast_pipe = pipeline("text-generation", model=fast, tokenizer=tokenizer, device=model.device)
    one = fast_pipe(arguments.prompts[0], **ask)
    many = fast_pipe(arguments.prompts, batch_size=len(arguments.prompts), **ask)
    assert one == stock_pipe(arguments.prompts[0], **ask)
    assert many == stock_pipe(arguments.prompts, batch_size=len(arguments.prompts), **ask)

    for texts in many:
        print(texts[0]["generated_text"], end="\n\n")
    print("the stock pipeline says the same")


if __name__ == "__main__":
    main()
