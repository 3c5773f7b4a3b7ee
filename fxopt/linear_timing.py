"""Which library makes the matrix products of a model quickest: each is timed on the shapes of its weights.

A weight is stood in for by random rows of its width, not all of them where it has many: those take in proportion.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxopt.onednn import onednn_linear
from fxopt.passes.linear_library import Library, LinearLibrary
from fxopt.program import LOGIT_POSITIONS, Program
from fxopt.timed_forms import FormTime, TimedForms
from fxopt.views import Linear, shape

ROWS = 64  # of the other factor: less than a chunk of a prompt, more than a step of a batch
ROUNDS = 5
MOST_NUMBERS = 2**21  # of what stands in for a weight

CALLS: Mapping[Library, Callable[[Tensor, Tensor, None], Tensor]] = {
    "aten": torch.ops.aten.linear.default,
    "onednn": onednn_linear,
}


def timed_linears(program: Program, libraries: Sequence[Library], rewriter: LinearLibrary) -> TimedForms:
    """Time the libraries, in turns, for all products of a graph that are made for every token."""
    sites = [site for site in rewriter.find(program) if not _reads_asked(program, site)]
    kinds = Counter(tuple(map(int, shape(site.weight))) for site in sites)
    seconds: dict[Library, float] = dict.fromkeys(libraries, 0.0)
    random = torch.Generator().manual_seed(0)
    for (rows, width), count in kinds.items():
        taken = min(rows, max(1, MOST_NUMBERS // width))
        x, weight = (torch.randn(size, width, generator=random) for size in (ROWS, taken))
        for library, median in _in_turns(libraries, x, weight).items():
            seconds[library] += median * count * rows / taken
    times = tuple(FormTime(library, seconds[library]) for library in libraries)
    return TimedForms(f"{ROWS} rows, {sum(kinds.values())} products", times)


def _reads_asked(program: Program, site: Linear) -> bool:
    """Whether it is made for those tokens alone whose logits are asked for, of which a prompt has one."""
    asked = program.placeholders().get(LOGIT_POSITIONS)
    return asked is not None and asked in site.x.all_input_nodes


@torch.no_grad()
def _in_turns(libraries: Sequence[Library], x: Tensor, weight: Tensor) -> Mapping[Library, float]:
    taken: dict[Library, list[float]] = {library: [] for library in libraries}
    for _ in range(1 + ROUNDS):
        for library in libraries:
            start = time.perf_counter()
            CALLS[library](x, weight, None)
            taken[library].append(time.perf_counter() - start)
    return {library: statistics.median(seconds[1:]) for library, seconds in taken.items()}
