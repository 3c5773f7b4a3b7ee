"""The graph with what is streamed written into it: which layer waits, what is stored, what is read ahead."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.listing import NAME, Line, Listing
from fxopt.offload.placement import Placement


def with_streams(graph: Listing, placed: Placement, what: str, made_by: str, *, stores: bool) -> Listing:
    """``graph`` with a wait in front of each layer that is streamed, and what follows behind it.

    ``what`` of a layer is streamed, "weights" or "rows"; ``stores`` says whether layers write some of it.
    """
    ends: dict[int, tuple[int, int]] = {}
    for place, line in enumerate(graph):
        if line.layer is not None and line.layer in placed.offloaded and not line.template.startswith(f"wait({NAME}"):
            first, _ = ends.get(line.layer, (place, place))
            ends[line.layer] = first, place
    front = {first: layer for layer, (first, _) in ends.items()}
    behind = {last: layer for layer, (_, last) in ends.items()}

    def lines() -> Iterator[Line]:
        for place, line in enumerate(graph):
            if place in front:
                yield _line("wait", front[place], front[place], what, made_by)
            yield line
            if place in behind:
                layer = behind[place]
                if stores:
                    yield _line("store", layer, layer, what, made_by)
                yield _line("prefetch", placed.ahead(layer)[0], layer, what, made_by)

    return tuple(lines())


def _line(verb: str, subject: int, layer: int, what: str, made_by: str) -> Line:
    return Line(f"{verb}({NAME}.{what})", (f"layer_{subject}",), layer, "", "", (made_by,))
