"""``fxopt plan MODEL``: the arena of a model's graphs, from its config alone."""

from __future__ import annotations

import argparse
import sys

from fxopt.cli.options import dtype_of, selection
from fxopt.errors import InvalidRequestError
from fxopt.memory.planner import BUDGET_S
from fxopt.planning import plan_model
from fxopt.shape_sets import ShapeSet

FORM = "write --shapes GRAPH:AXIS=N,… such as prefill:step=128,window=512"


def run(arguments: argparse.Namespace) -> int:
    made = plan_model(
        arguments.model,
        arguments.max_len,
        shapes=None if arguments.shapes is None else read_shapes(arguments.shapes),
        batch=arguments.batch or 1,
        merge=arguments.merge or "tables",
        passes=selection(arguments),
        dtype=dtype_of(arguments),
        budget_s=arguments.budget or BUDGET_S,
    )
    print(made)
    if arguments.out:
        for path in made.dump(arguments.out):
            print(f"plan: {path}", file=sys.stderr)
    if arguments.svg:
        for path in made.draw(arguments.svg):
            print(f"picture: {path}", file=sys.stderr)
    return 0


def read_shapes(texts: list[str]) -> dict[str, list[ShapeSet]]:
    """The sets of every graph that is named; a name alone stands for its usual sets."""
    found: dict[str, list[ShapeSet]] = {}
    alone = set()
    for text in texts:
        graph, _, sizes = (part.strip() for part in text.partition(":"))
        sets = found.setdefault(graph, [])
        if sizes:
            sets.append(_sizes(text, sizes))
        else:
            alone.add(graph)
    if both := [graph for graph, sets in found.items() if sets and graph in alone]:
        raise InvalidRequestError(f"--shapes has {both[0]} alone, for its usual sets, and with sizes; give one of them")
    return found


def _sizes(text: str, sizes: str) -> ShapeSet:
    found: dict[str, int] = {}
    for part in sizes.split(","):
        axis, equals, number = (word.strip() for word in part.partition("="))
        if not axis or not equals:
            raise InvalidRequestError(f"{part.strip()!r} in {text!r} is no size; {FORM}")
        if axis in found:
            raise InvalidRequestError(f"{text!r} has two sizes for {axis}; give one")
        try:
            found[axis] = int(number)
        except ValueError:
            raise InvalidRequestError(f"{axis}={number} in {text!r} is no size; give a whole number") from None
    return found
