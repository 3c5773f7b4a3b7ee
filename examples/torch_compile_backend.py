"""The passes that need no cache in ``torch.compile``: the same logits, and what was done to each graph.

python examples/torch_compile_backend.py                               # SmolLM2-135M, compiled by Inductor
python examples/torch_compile_backend.py --tiny --backend aot_eager    # a tiny random model, in seconds
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fxopt
from fxopt.demo_model import load_model
from fxopt.families import tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--backend", default="inductor", help="the compiler behind the passes")
    asked = parser.parse_args()
    model: Any = tiny("llama") if asked.tiny else load_model("demo", torch.float32)[0]

    fast: Any = torch.compile(model, backend="fxopt", options={"backend": asked.backend})

    with torch.no_grad():
        for length in (9, 17, 33):  # the second length makes Dynamo compile once more, for all lengths
            tokens = torch.arange(3, 3 + length)[None]
            torch.testing.assert_close(fast(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)
        # Query, key and value are one weight now, of which the parameters are views: updates are seen.
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        torch.testing.assert_close(fast(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)
    print(*fxopt.dynamo_backend.last_reports(), sep="\n")


if __name__ == "__main__":
    main()
