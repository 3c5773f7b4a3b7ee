"""Where compiled code keeps what it computes, as pictures: one for each piece of each graph."""

from __future__ import annotations

from collections.abc import Mapping

from fxopt.memory import draw_beside, plan
from fxopt.placement import ArenaUse, PlacedBuffer, Placement


def pictures(arenas: Mapping[str, ArenaUse]) -> list[str]:
    """SVGs, the greedy by size beside the plan that the code has, the largest arena first."""
    found = [
        (piece.arena, _picture(f"{graph}, {_runs(count)}", piece))
        for graph, use in arenas.items()
        for piece, count in zip(use.pieces, use.runs, strict=True)
        if piece is not None and piece.arena
    ]
    return [picture for _, picture in sorted(found, key=lambda one: -one[0])]


def _picture(title: str, piece: Placement) -> str:
    greedy = plan(piece.plan.problem, "itrex")
    beside = [("Greedy over shared blocks (itrex)", greedy), ("As the code has it", piece.plan)]
    return draw_beside(beside, title, {one.name: _caption(one) for one in piece.buffers})


def _caption(one: PlacedBuffer) -> str:
    where = "outside of the layers" if one.layer is None else f"layer {one.layer}, or one that is like it"
    return f"{one.shape}, {where}, {one.source}"


def _runs(count: int) -> str:
    return "code that runs once" if count == 1 else f"code that runs {count} times"
