"""Reports for the tests of the page: of a deep model, and of one whose names are markup."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fxopt
from fxopt.families import tiny
from fxopt.listing import Line
from fxopt.outcome import Check, Outcome, Spot
from fxopt.report import Report

LAYERS = 32
HOSTILE = "</script><!-- </style></title><img src=x onerror='window.hacked=1'>&<b>\u2028"


@functools.cache
def deep() -> Report:
    """Of a model with 32 layers, made from one with two: capturing so many takes longer than all tests."""
    fast: Any = fxopt.optimize(tiny("llama"), max_len=100, backend="eager", verify="each")
    made: Report = fast.fxopt.report
    for stage in made.stages:
        stage.listing = tuple(_deeper(stage.listing))
        stage.refused = [replace(spot, layer=layer) for spot in stage.refused for layer in range(LAYERS)]
    return made


def _deeper(listing: tuple[Line, ...]) -> Iterator[Line]:
    """The last layer again and again, under names of its own."""
    last = [line for line in listing if line.layer == 1]
    own = {line.name for line in last}

    def renamed(name: str, layer: int) -> str:
        if name in own:
            return f"{name}_of_{layer}"
        return re.sub(r"(^key_|^value_|layers[._])1(?=$|[._])", rf"\g<1>{layer}", name)

    for line in listing:
        yield line
        if last and line is last[-1]:
            for layer in range(2, LAYERS):
                for copied in last:
                    yield replace(copied, layer=layer, names=tuple(renamed(name, layer) for name in copied.names))


def hostile(report: Report) -> Report:
    """The same with markup wherever a model or a pass could put it."""

    def spoiled(stage: Outcome) -> Outcome:
        spot = Spot(HOSTILE, HOSTILE, 0, HOSTILE)
        lines = tuple(
            replace(
                line,
                template=line.template.replace("(", f"({HOSTILE}", 1),
                names=tuple(f"{name}{HOSTILE}" for name in line.names),
                source=HOSTILE,
                value=HOSTILE,
                made_by=(HOSTILE,),
            )
            for line in stage.listing
            if line.layer in (None, 0)
        )
        return replace(
            stage, listing=lines, sites=[spot], refused=[spot], near=[spot], summary=HOSTILE, ops={HOSTILE: 1}
        )

    stages = [spoiled(stage) for stage in report.stages]
    stages[2] = replace(stages[2], name=HOSTILE, dropped=HOSTILE, verified=Check(HOSTILE, math.inf, 0.0, HOSTILE))
    return replace(
        report,
        model=HOSTILE,
        backend=HOSTILE,
        stages=stages,
        checks=[Check(HOSTILE, 1.0, 2.0, HOSTILE)],
        seconds={HOSTILE: 1.0},
        launches={HOSTILE: 3},
    )
