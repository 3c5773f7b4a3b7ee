"""Text as it is written: ``generate`` works in a thread, and the pieces come out of an iterator.

python examples/streaming.py
python examples/streaming.py --prompt "Once upon a time" --new 200
"""

from __future__ import annotations

import argparse
import threading
import time

import torch
from transformers import TextIteratorStreamer

import fxopt
from fxopt.demo_model import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--prompt", default="The three laws of robotics are")
    parser.add_argument("--new", type=int, default=80)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, torch.float32)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    longest = inputs.input_ids.shape[1] + arguments.new
    fast = fxopt.optimize(model, max_len=longest, max_batch=1, backend=arguments.backend)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {**inputs, "max_new_tokens": arguments.new, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=fast.generate, kwargs=options)
    began = time.perf_counter()
    thread.start()
    first = 0.0
    print(arguments.prompt, end="", flush=True)
    for piece in streamer:
        first = first or time.perf_counter() - began
        print(piece, end="", flush=True)
    thread.join()
    total = time.perf_counter() - began
    print(f"\n[first words after {first:.3f} s, all of it after {total:.3f} s]")


if __name__ == "__main__":
    main()
