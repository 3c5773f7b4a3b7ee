"""A pass of your own in twenty lines: it is checked, counted and reported like the others.

Multiplying by one is a favourite of model code (``attention_scaling`` is 1.0 unless a long-context
variant of RoPE is on). This pass takes such multiplications out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.passes import PASSES
from fxopt.program import Program
from fxopt.views import arguments


@dataclass(frozen=True)
class TimesOne:
    """``node = mul(x, 1)``"""

    node: Node
    x: Node


@dataclass(frozen=True)
class DropTimesOne(fxopt.Pass[TimesOne]):
    name = "drop_times_one"
    summary = "takes out multiplications by one"

    def find(self, program: Program) -> Iterator[TimesOne]:
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor and arguments(node)["other"] == 1.0:
                yield TimesOne(node, arguments(node)["self"])

    def refuse(self, program: Program, site: TimesOne) -> str | None:
        if site.x.meta["val"].dtype != site.node.meta["val"].dtype:
            return f"{site.node} also casts to {site.node.meta['val'].dtype}"
        return None

    def rewrite(self, program: Program, site: TimesOne) -> None:
        site.node.replace_all_uses_with(site.x)
        program.graph.erase_node(site.node)


def main() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    fast = fxopt.optimize(model, max_len=128, backend="eager", passes=[*PASSES, DropTimesOne()])
    print(fast.fxopt.report)


if __name__ == "__main__":
    main()
