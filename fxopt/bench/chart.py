"""Lines over sizes, as an SVG that needs nothing else: one panel beside the other, one colour for each contender."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxopt.memory.picture import safe

Point = tuple[float, float]

PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 470, 330, 2
LEFT, RIGHT, TOP, BOTTOM = 66, 28, 44, 50  # of a panel, around what is drawn
HEAD, LEGEND_LINE = 44, 22
LETTER = 6.6  # pixels of a letter of the legend
TICKS, TICK_ROOM = 6, 34  # at most so many on the left, and pixels between two below
WIDE = 16.0  # sizes of which the largest is so many times the smallest are drawn by powers
AIR = 1.06

#: For light and for dark; further lines begin again.
COLOURS = (
    ("#5b6675", "#a9b4c2"),
    ("#b0560a", "#f0a35e"),
    ("#1763b6", "#6fb1f5"),
    ("#24805c", "#63c99d"),
    ("#8b3fa8", "#cd94e4"),
    ("#b3304f", "#f2879f"),
    ("#7d7209", "#d6c94f"),
    ("#0e7f8c", "#5fcbd8"),
)

# Every colour is said twice, since not every program that shows SVG knows light-dark().
_STYLE = """
:root { color-scheme: light dark; }
.bench { font: 12px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.bench .sheet { fill: #ffffff; fill: light-dark(#ffffff, #151a21); }
.bench text { fill: #1b2230; fill: light-dark(#1b2230, #dfe5ee); }
.bench .faint { fill: #525d6e; fill: light-dark(#525d6e, #9ba8b9); }
.bench .grid { stroke: #dde1e7; stroke: light-dark(#dde1e7, #2a323d); }
.bench .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.bench .dot { stroke: #ffffff; stroke: light-dark(#ffffff, #151a21); stroke-width: 1; }
"""


@dataclass(frozen=True)
class Panel:
    """One picture among others: what is drawn over what, for each name."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]]


def draw(panels: Sequence[Panel], title: str) -> str:
    """Panels in reading order, below a title and one legend for all."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    columns = min(COLUMNS, len(panels))
    width = columns * PANEL_WIDTH
    legend = list(_legend(names, width))
    head = HEAD + LEGEND_LINE * len(legend)
    height = head + PANEL_HEIGHT * math.ceil(len(panels) / columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bench" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="{safe(title)}">',
        f"<style>{_STYLE}{_colours(len(names))}</style>",
        f'<rect class="sheet" width="{width}" height="{height}"/>',
        f'<text x="20" y="28" font-size="16" font-weight="600">{safe(title)}</text>',
        *itertools.chain.from_iterable(legend),
    ]
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        parts += _panel(panel, names, column * PANEL_WIDTH, head + row * PANEL_HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Scale:
    """Values as pixels."""

    xs: tuple[float, ...]  # that have a measurement
    highest: float
    left: float
    top: float

    @property
    def by_powers(self) -> bool:
        return self.xs[0] > 0 and self.xs[-1] / self.xs[0] >= WIDE

    def x(self, value: float) -> float:
        first, last = (self._spread(end) for end in (self.xs[0], self.xs[-1]))
        share = (self._spread(value) - first) / (last - first) if last > first else 0.5
        return self.left + LEFT + share * (PANEL_WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.bottom - value / self.highest * (PANEL_HEIGHT - TOP - BOTTOM)

    @property
    def bottom(self) -> float:
        return self.top + PANEL_HEIGHT - BOTTOM

    def _spread(self, value: float) -> float:
        return math.log2(value) if self.by_powers else value


def _panel(panel: Panel, names: Sequence[str], left: float, top: float) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    xs = tuple(sorted({x for x, _ in points}))
    parts = [f'<text x="{left + LEFT}" y="{top + 24}" font-size="13" font-weight="600">{safe(panel.title)}</text>']
    if not points:
        return [*parts, f'<text class="faint" x="{left + LEFT}" y="{top + 60}">not measured</text>']
    scale = _Scale(xs, AIR * max(y for _, y in points) or 1.0, left, top)
    parts += [*_axes(scale, panel)]
    for name, line in panel.lines.items():
        parts += _line(scale, panel, name, sorted(line), names.index(name) % len(COLOURS))
    return parts


def _axes(scale: _Scale, panel: Panel) -> Iterator[str]:
    left, right = scale.left + LEFT, scale.left + PANEL_WIDTH - RIGHT
    for value in ticks(scale.highest):
        y = scale.y(value)
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="faint" text-anchor="end" x="{left - 8}" y="{y + 4:.1f}">{value:,g}</text>'
    written = -math.inf
    for value in scale.xs:
        x = scale.x(value)
        if x - written >= TICK_ROOM:
            written = x
            yield f'<text class="faint" text-anchor="middle" x="{x:.1f}" y="{scale.bottom + 18}">{value:,g}</text>'
    middle = (left + right) / 2
    yield f'<text class="faint" text-anchor="middle" x="{middle}" y="{scale.bottom + 38}">{safe(panel.x)}</text>'
    yield f'<text class="faint" x="{left}" y="{scale.top + TOP - 4}">{safe(panel.y)}</text>'


def _line(scale: _Scale, panel: Panel, name: str, line: Sequence[Point], colour: int) -> Iterator[str]:
    if len(line) > 1:
        path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in line)
        yield f'<polyline class="line stroke-{colour}" points="{path}"/>'
    for x, y in line:
        said = safe(f"{name}\n{panel.x} {x:,g}: {y:,.4g} {panel.y}")
        place = f'cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="4"'
        yield f'<circle class="dot fill-{colour}" {place}><title>{said}</title></circle>'


def _legend(names: Sequence[str], width: int) -> Iterator[list[str]]:
    """Lines of it, each with as many names as fit."""
    line: list[str] = []
    x, y = 20.0, HEAD + 6
    for number, name in enumerate(names):
        room = 34 + LETTER * len(name)
        if line and x + room > width:
            yield line
            line, x, y = [], 20.0, y + LEGEND_LINE
        line.append(f'<circle class="fill-{number % len(COLOURS)}" cx="{x + 6}" cy="{y - 4}" r="5"/>')
        line.append(f'<text x="{x + 17:.1f}" y="{y}">{safe(name)}</text>')
        x += room
    if line:
        yield line


def _colours(count: int) -> str:
    return "".join(
        f".bench .{kind}-{number} {{ {kind}: {light}; {kind}: light-dark({light}, {dark}); }}\n"
        for number, (light, dark) in enumerate(COLOURS[:count])
        for kind in ("stroke", "fill")
    )


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to ``highest``, ``TICKS`` steps at most."""
    power = 10.0 ** math.floor(math.log10(highest / TICKS))
    width = next(digit * power for digit in (1, 2, 5, 10) if highest / (digit * power) <= TICKS)
    return [round(number * width, 12) for number in range(math.floor(highest / width) + 1)]
