"""Matrix products by the library that makes them quickest.

    y = linear(x, W, b)      becomes      y = onednn_linear(x, W, b)

PyTorch hands float32 to the BLAS that it was built with, and half precision to oneDNN where the processor has
instructions for it. On some processors oneDNN is twice as quick in float32 too, on others it is not, so both are
timed on the model's own shapes before the choice is made. Weights stay as they lie: nothing is packed and there is
no second copy. It is the last thing that happens to a graph, so that every other pass meets ``linear``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.fx import Node

from fxopt.errors import InvalidRequestError
from fxopt.onednn import is_built_in, onednn_linear
from fxopt.program import Facts, Program
from fxopt.rewrite import Pass, Stage
from fxopt.views import Linear, shape

Library = Literal["auto", "onednn", "aten"]
LEAST_NUMBERS = 2**18  # of a weight: below that a library's own overhead is what would be timed


@dataclass(frozen=True)
class LinearLibrary(Pass[Linear]):
    name = "linear_library"
    summary = "float32 matrix products on a CPU by the library that is quickest there"
    stage = Stage.CODE

    library: Library = "auto"

    def __post_init__(self) -> None:
        if self.library not in get_args(Library):
            raise InvalidRequestError(f"library={self.library!r} is none; there are {', '.join(get_args(Library))}")

    def candidates(self, program: Program) -> tuple[Library, ...]:
        """The libraries that only timing can choose between; PyTorch's own choice is the one to compare with."""
        if self.library != "auto" or not is_built_in():
            return ()
        return ("aten", "onednn") if any(_numbers(site) >= LEAST_NUMBERS for site in self.find(program)) else ()

    def expected(self, program: Program) -> int:
        return sum(self.refuse(program, site) is None for site in self.find(program))

    def find(self, program: Program) -> Iterator[Linear]:
        for site in Linear.all(program):
            result = site.node.meta["val"]
            if result.dtype == torch.float32 and result.device.type == "cpu" and _is_matrix(site.weight):
                yield site

    def refuse(self, program: Program, site: Linear) -> str | None:
        if (reason := self._why_aten(program.facts)) is not None:
            return reason
        if not site.weight.meta["val"].is_contiguous():
            return f"the rows of its weight {site.weight} do not lie one behind the other"
        if site.bias is not None and not _is_row(site.bias, site.rows):
            return f"its bias {site.bias} is not {site.rows} numbers one behind the other"
        return None

    def rewrite(self, program: Program, site: Linear) -> None:
        with program.graph.inserting_before(site.node):
            result = program.graph.call_function(onednn_linear, (site.x, site.weight, site.bias))
        site.node.replace_all_uses_with(result)
        program.graph.erase_node(site.node)

    def _why_aten(self, facts: Facts) -> str | None:
        """Why the products stay with PyTorch's own choice, if they do."""
        if self.library == "aten":
            return 'library="aten" was asked for'
        if not is_built_in():
            return "this PyTorch was built without oneDNN"
        if self.library == "onednn" or (facts.linears is not None and facts.linears.quickest == "onednn"):
            return None
        if facts.linears is not None:
            return f"PyTorch's own choice was quickest: {facts.linears}"
        return "no library was timed, as optimize does where weights are large and plan_memory places no results"


def _is_matrix(weight: Node) -> bool:
    """Whether it has two sizes that are numbers, as a parameter has."""
    return len(shape(weight)) == 2 and all(isinstance(size, int) for size in shape(weight))


def _is_row(bias: Node, length: int) -> bool:
    return list(shape(bias)) == [length] and bool(bias.meta["val"].is_contiguous())


def _numbers(site: Linear) -> int:
    return math.prod(map(int, shape(site.weight)))
