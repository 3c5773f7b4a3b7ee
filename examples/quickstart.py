"""The shortest use of fxopt: a real model, the same tokens, the report.

python examples/quickstart.py            # SmolLM2-135M, compiled by Inductor
python examples/quickstart.py --tiny     # a tiny random model, in seconds
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.demo_model import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
        prompt = torch.arange(3, 13)[None]
    else:
        model, tokenizer = load_model("demo", torch.float32)
        prompt = tokenizer("The three laws of robotics are", return_tensors="pt").input_ids

    fast = fxopt.optimize(model, max_len=128, backend="eager" if tiny else "inductor")
    tokens = fast.generate(prompt, max_new_tokens=40, do_sample=False)

    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=40, do_sample=False))
    print(fast.fxopt.report)
    if not tiny:
        print(tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()
