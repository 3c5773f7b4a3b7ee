"""A chat that reads each word once: the cache of one turn goes on in the next.

python examples/chat.py                        # SmolLM2-135M; end with an empty line
echo "What is a graph?" | python examples/chat.py --new 40
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor
from transformers import TextStreamer

import fxopt
from fxopt.demo_model import load_model


def in_common(a: Tensor, b: Tensor) -> int:
    """How many tokens two conversations begin with together."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.tolist(), b.tolist(), strict=False))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer, at most")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, torch.float32)
    fast = fxopt.optimize(model, max_len=arguments.max_len, max_batch=1, backend=arguments.backend)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    messages: list[dict[str, str]] = []
    said, cache = torch.empty(1, 0, dtype=torch.long), None
    while text := read_line():
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = prompt.input_ids
        if ids.shape[1] + arguments.new > arguments.max_len:
            print(f"[the conversation is {ids.shape[1]} tokens long; --max-len is {arguments.max_len}]")
            break
        if cache is not None:  # a template may write an earlier answer differently: go back to where it does
            cache.crop(-max(0, cache.get_seq_length() - in_common(ids[0], said[0])))
        known = 0 if cache is None else cache.get_seq_length()
        output = fast.generate(
            **prompt,
            past_key_values=cache,
            max_new_tokens=arguments.new,
            do_sample=False,
            streamer=streamer,
            return_dict_in_generate=True,
        )
        said, cache = output.sequences, output.past_key_values
        answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"[{ids.shape[1]} tokens of prompt, {known} of them were in the cache]")


def read_line() -> str:
    """What the user types; nothing at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
