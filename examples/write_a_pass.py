"""A pass of your own, and a wrong one that is caught: docs/write-a-pass.md, as a program.

Models write their norm as five calls; PyTorch has one that does the same. This pass puts the one
in place of the five.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

import fxopt
from fxopt.families import tiny
from fxopt.program import Program
from fxopt.registry import register, unregister
from fxopt.views import arguments, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """``node = x * rsqrt(mean(x ** 2, dim) + eps)``"""

    node: Node
    x: Node
    dim: list[int]
    eps: float

    @classmethod
    def ending_in(cls, rsqrt: Node) -> Norm | fxopt.Miss:
        """Walk from ``rsqrt`` towards ``x``; where the way ends too early, say what stands there."""
        steps: list[dict[str, Any]] = []
        node = rsqrt
        for wanted in (aten.add.Tensor, aten.mean.dim, aten.pow.Tensor_Scalar):
            node = arguments(node)["self"]
            if node.target is not wanted:
                return fxopt.Miss(rsqrt, f"{node} is no {wanted}")
            steps.append(arguments(node))
        add, mean, power = steps
        x = power["self"]
        scaled = [user for user in rsqrt.users if user.target is aten.mul.Tensor and x in user.all_input_nodes]
        if len(scaled) != 1 or power["exponent"] != 2 or not isinstance(add["other"], float):
            return fxopt.Miss(rsqrt, f"what it scales is not {x}, the tensor that was squared")
        return cls(scaled[0], x, mean["dim"], add["other"])


@dataclass(frozen=True)
class RMSNorm(fxopt.Pass[Norm]):
    name = "rms_norm"
    summary = "x * rsqrt(mean(x²) + eps) as one call"

    def expected(self, program: Program) -> int:
        """The modules that call themselves RMSNorm: the model's own word, not that of ``find``."""
        stacks = [node.meta.get("nn_module_stack") or {} for node in program.graph.nodes]
        return len({path for stack in stacks for path, kind in stack.values() if str(kind).endswith("RMSNorm")})

    def find(self, program: Program) -> Iterator[Norm | fxopt.Miss]:
        for node in program.graph.nodes:
            if node.target is aten.rsqrt.default:
                yield Norm.ending_in(node)

    def refuse(self, program: Program, site: Norm) -> str | None:
        if site.dim != [-1]:
            return f"{site.node}: the mean is over dimensions {site.dim}, and rms_norm takes the last one"
        return None

    def rewrite(self, program: Program, site: Norm) -> None:
        with program.graph.inserting_before(site.node):
            norm = program.graph.call_function(aten.rms_norm.default, (site.x, [shape(site.x)[-1]], None, site.eps))
        site.node.replace_all_uses_with(norm)


@dataclass(frozen=True)
class WrongNorm(RMSNorm):
    """The easy mistake: ``layer_norm`` also takes the mean away."""

    name = "wrong_norm"

    def rewrite(self, program: Program, site: Norm) -> None:
        with program.graph.inserting_before(site.node):
            last = [shape(site.x)[-1]]
            norm = program.graph.call_function(aten.layer_norm.default, (site.x, last, None, None, site.eps))
        site.node.replace_all_uses_with(norm)


def main() -> None:
    model = tiny("llama")

    register(RMSNorm)
    fast = fxopt.optimize(model, max_len=128, backend="eager")
    print(fast.fxopt.report.diff("rms_norm"))
    print(fast.fxopt.report)

    unregister("rms_norm")
    register(WrongNorm)
    fast = fxopt.optimize(model, max_len=128, backend="eager", verify="each")
    print(f"\nwrong_norm was dropped: {fast.fxopt.report['wrong_norm'].dropped}")


if __name__ == "__main__":
    main()
