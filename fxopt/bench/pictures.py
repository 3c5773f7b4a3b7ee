"""Which lines a sweep makes."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

from fxopt.bench.chart import Panel
from fxopt.bench.figures import Figures
from fxopt.bench.results import Results
from fxopt.bench.setting import Setting

#: Sizes that a sweep may vary: what they are called below an axis, and in a title.
SIZES = {
    "batch": ("sequences", "batch {}"),
    "prompt": ("tokens of prompt", "prompt {}"),
    "new": ("new tokens", "{} new tokens"),
}

#: What is drawn, what it is called and counted in.
DRAWN: tuple[tuple[str, str, Callable[[Figures], float | None]], ...] = (
    ("Decode", "tokens/s", lambda one: one.decode_tok_s),
    ("Overall", "tokens/s, prefill included", lambda one: one.tok_s),
    ("Prefill", "ms", lambda one: one.prefill_ms),
    ("Peak memory", "MB", lambda one: one.peak_mb),
)


def drawing(settings: Sequence[Setting]) -> Callable[[Results], list[Panel]] | None:
    """How results in these settings are drawn; None if they are no sweep."""
    size = varied(settings)
    return None if size is None else functools.partial(panels, size=size)


def varied(settings: Sequence[Setting]) -> str | None:
    """The size with the most values, if any has several: the one that goes to the right."""
    counts = {name: len({getattr(setting, name) for setting in settings}) for name in SIZES}
    most = max(counts, key=lambda name: counts[name])
    return most if counts[most] > 1 else None


def panels(results: Results, size: str) -> list[Panel]:
    """For each combination of the other sizes, everything that is drawn over this one."""
    others: dict[Setting, list[Figures]] = defaultdict(list)
    for one in results.figures:
        others[dataclasses.replace(one.setting, **{size: 0})].append(one)
    also = [name for name in SIZES if name != size and _varies(results, name)]
    found = []
    for rest, group in others.items():
        said = f", {_said(rest, also)}" if also else ""
        for what, unit, value in DRAWN:
            found.append(Panel(what + said, SIZES[size][0], unit, lines(group, size, value)))
    return found


def lines(
    group: Sequence[Figures], size: str, value: Callable[[Figures], float | None]
) -> dict[str, list[tuple[float, float]]]:
    """A line for each contender, of what was measured."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in group:
        y = value(one)
        if y is not None:
            found[one.contender].append((float(getattr(one.setting, size)), y))
    return dict(found)


def title(results: Results) -> str:
    """The model, and the sizes that are the same in all settings."""
    same = [_said(results.settings[0], [name]) for name in SIZES if not _varies(results, name)]
    return ", ".join([results.model, results.dtype, *same])


def _varies(results: Results, name: str) -> bool:
    return len({getattr(setting, name) for setting in results.settings}) > 1


def _said(setting: Setting, names: Sequence[str]) -> str:
    return ", ".join(SIZES[name][1].format(getattr(setting, name)) for name in names)
