"""A plan as a picture: time to the right, the arena upwards, one rectangle for each buffer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from fxopt.memory.planner import Plan
from fxopt.memory.problem import Buffer

Captions = Mapping[str, str]  # by buffer

WIDTH, HEIGHT = 1000, 520
NARROW, HEADING = 700, 34  # for plans beside each other: the width of one, and what is above all of them
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 64, 44
TICKS = 8
LETTER, LINE, THIN = 6.2, 13, 3  # pixels of a label's letter, of its height, and of what needs no line around it

#: One colour for each kind of buffer, in light and in dark; further kinds begin again.
COLOURS = (
    ("#7fa8dc", "#3d6aa8"),
    ("#8cc7b5", "#2f7a68"),
    ("#e8b98a", "#96602a"),
    ("#b9a8e0", "#6552a0"),
    ("#d99aa8", "#8f4a5c"),
    ("#b5bcc6", "#566170"),
)
OTHER = "other"  # the kind that has the last colour
#: Neighbours of one colour are told apart by how strong it is.
STRENGTHS = (1.0, 0.8, 0.62)

# Every colour is said twice, since not every program that shows SVG knows light-dark().
_STYLE = """
:root { color-scheme: light dark; }
.memory-plan { font: 12px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.memory-plan .sheet { fill: #ffffff; fill: light-dark(#ffffff, #151a21); }
.memory-plan text { fill: #1b2230; fill: light-dark(#1b2230, #dfe5ee); }
.memory-plan .faint { fill: #525d6e; fill: light-dark(#525d6e, #9ba8b9); }
.memory-plan .name { font-size: 10.5px; pointer-events: none; fill: #10151f; fill: light-dark(#10151f, #f2f5fa); }
.memory-plan .grid { stroke: #dde1e7; stroke: light-dark(#dde1e7, #2a323d); }
.memory-plan .buffer { stroke: #ffffff; stroke: light-dark(#ffffff, #151a21); stroke-width: 0.7; }
.memory-plan .thin { stroke-width: 0; }
.memory-plan .buffer:hover { stroke: #1b2230; stroke: light-dark(#1b2230, #dfe5ee); stroke-width: 1; fill-opacity: 1; }
.memory-plan .arena { stroke: #525d6e; stroke: light-dark(#525d6e, #9ba8b9); }
.memory-plan .bound { stroke: #b03d06; stroke: light-dark(#b03d06, #ff9a66); stroke-width: 1.5; stroke-dasharray: 6 4; }
.memory-plan .bound-text { fill: #b03d06; fill: light-dark(#b03d06, #ff9a66); }
"""

_CONTROL = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML cannot hold


def draw(plan: Plan, title: str = "Memory plan", captions: Captions | None = None) -> str:
    """An SVG that needs nothing else. ``captions`` are further words on buffers, shown when one points at them."""
    return _sheet([(title, plan)], title, 0, captions or {})


def draw_beside(
    plans: Sequence[tuple[str, Plan]], title: str = "Memory plans", captions: Captions | None = None
) -> str:
    """Plans for the same buffers from left to right, each with its name, on one scale of bytes."""
    return _sheet(plans, title, HEADING, captions or {})


def _sheet(plans: Sequence[tuple[str, Plan]], title: str, heading: int, captions: Captions) -> str:
    """The plans, below ``heading`` pixels for what is said of all of them."""
    width, height = WIDTH if len(plans) == 1 else len(plans) * NARROW, HEIGHT + heading
    highest = max([1, *(plan.size for _, plan in plans)])
    kinds = list(dict.fromkeys(buffer.kind for _, plan in plans for buffer in plan.problem.placed))
    kinds.sort(key=OTHER.__eq__)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="memory-plan" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{safe(title)}">',
        f"<style>{_STYLE}{_kind_styles(kinds)}</style>",
        f'<rect class="sheet" width="{width}" height="{height}"/>',
        *_legend(kinds, width),
    ]
    if heading:
        parts.append(f'<text x="{LEFT}" y="26" font-size="16" font-weight="600">{safe(title)}</text>')
    for place, (name, plan) in enumerate(plans):
        left, right = (edge * width // len(plans) for edge in (place, place + 1))
        scale = _Scale.of(plan, highest, (left + LEFT, right - RIGHT), (heading + TOP, height - BOTTOM))
        parts += [*_head(scale, name, plan), *_axes(scale)]
        for number, buffer in enumerate(plan.problem.placed):
            words = captions.get(buffer.name, "")
            parts += _rectangle(scale, buffer, plan.offsets[buffer.name], number, kinds.index(buffer.kind), words)
        parts += _levels(scale, plan)
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class _Scale:
    """Steps and bytes as pixels, and the edges of what is drawn."""

    first: int
    last: int
    highest: int
    left: int
    right: int
    top: int
    bottom: int

    @classmethod
    def of(cls, plan: Plan, highest: int, sides: tuple[int, int], ends: tuple[int, int]) -> _Scale:
        lives = [(buffer.start, buffer.end) for buffer in plan.problem.placed] or [(0, 1)]
        return cls(min(start for start, _ in lives), max(end for _, end in lives), highest, *sides, *ends)

    def x(self, step: float) -> float:
        return self.left + (step - self.first) / (self.last - self.first) * (self.right - self.left)

    def y(self, nbytes: float) -> float:
        return self.bottom - nbytes / self.highest * (self.bottom - self.top)


def _head(scale: _Scale, name: str, plan: Plan) -> list[str]:
    return [
        f'<text x="{scale.left}" y="{scale.top - 40}" font-size="15" font-weight="600">{safe(name)}</text>',
        f'<text class="faint" x="{scale.left}" y="{scale.top - 21}">{safe(_summary(plan))}</text>',
    ]


def _rectangle(scale: _Scale, buffer: Buffer, offset: int, number: int, kind: int, caption: str) -> list[str]:
    left, right = scale.x(buffer.start), scale.x(buffer.end)
    top, bottom = scale.y(offset + buffer.size), scale.y(offset)
    said = [
        f"{buffer.name} ({buffer.kind})",
        f"{buffer.nbytes:,} bytes ({readable(buffer.nbytes)}) at {offset:,}",
        f"steps {buffer.start} to {buffer.end}",
        *filter(None, [caption]),
    ]
    thin = " thin" if right - left < THIN else ""  # a line around it would hide it
    strength = STRENGTHS[number % len(STRENGTHS)]
    found = [
        f'<rect class="buffer kind-{kind % len(COLOURS)}{thin}" fill-opacity="{strength}" x="{left:.2f}" y="{top:.2f}" '
        f'width="{right - left:.2f}" height="{bottom - top:.2f}"><title>{safe(chr(10).join(said))}</title></rect>'
    ]
    if bottom - top > LINE and right - left > LETTER * len(buffer.name) + 6:
        found.append(
            f'<text class="name" x="{left + 4:.2f}" y="{(top + bottom) / 2 + 3.5:.2f}">{safe(buffer.name)}</text>'
        )
    return found


def _axes(scale: _Scale) -> list[str]:
    found, centred = [], 'class="faint" text-anchor="middle"'
    unit = 1024 ** int(math.log(scale.highest, 1024))
    for nbytes in _ticks(0, scale.highest, unit):
        y = scale.y(nbytes)
        found += [
            f'<line class="grid" x1="{scale.left}" x2="{scale.right}" y1="{y:.2f}" y2="{y:.2f}"/>',
            f'<text class="faint" text-anchor="end" x="{scale.left - 8}" y="{y + 4:.2f}">{readable(nbytes)}</text>',
        ]
    for step in _ticks(scale.first, scale.last, 1):
        found.append(f'<text {centred} x="{scale.x(step):.2f}" y="{scale.bottom + 18}">{step:,.0f}</text>')
    return [*found, f'<text {centred} x="{(scale.left + scale.right) / 2}" y="{scale.bottom + 36}">time</text>']


def _ticks(first: int, last: int, unit: int) -> Iterator[float]:
    """Round numbers of a unit from ``first`` to ``last``, ``TICKS`` steps at most."""
    widths = [unit / 4, unit / 2, *(unit * digit * 10**power for power in range(19) for digit in (1, 2, 5))]
    width = next(width for width in widths if width >= 1 and (last - first) / width <= TICKS)
    number = math.ceil(first / width)
    while number * width <= last:
        yield number * width
        number += 1


def _levels(scale: _Scale, plan: Plan) -> list[str]:
    """The lower bound above all rectangles, which would hide it, and the end of the arena."""
    arena, bound = scale.y(plan.size), scale.y(plan.lower_bound)
    ends = f'x1="{scale.left}" x2="{scale.right}"'
    words = f"lower bound {readable(plan.lower_bound)}"
    place = f'text-anchor="end" x="{scale.right}" y="{scale.top - 6}"'
    return [
        f'<line class="arena" {ends} y1="{arena:.2f}" y2="{arena:.2f}"/>',
        f'<line class="bound" {ends} y1="{bound:.2f}" y2="{bound:.2f}"><title>{words}</title></line>',
        f'<text class="bound-text" {place}>- - {words}</text>',
    ]


def _legend(kinds: list[str], width: int) -> list[str]:
    """The kinds from right to left, if there are several."""
    found: list[str] = []
    x = float(width - RIGHT)
    for number, kind in reversed(list(enumerate(kinds)) if len(kinds) > 1 else []):
        x -= LETTER * len(kind) + 34
        swatch = f'class="kind-{number % len(COLOURS)}" x="{x:.1f}" y="14" width="11" height="11" rx="2"'
        found += [f"<rect {swatch}/>", f'<text class="faint" x="{x + 16:.1f}" y="24">{safe(kind)}</text>']
    return found


def _kind_styles(kinds: list[str]) -> str:
    return "".join(
        f".memory-plan .kind-{number} {{ fill: {light}; fill: light-dark({light}, {dark}); }}\n"
        for number, (light, dark) in enumerate(COLOURS[: len(kinds)])
    )


def _summary(plan: Plan) -> str:
    said = f"arena {readable(plan.size)}, {plan.status}"
    if plan.gap:
        said += f" (at most {plan.gap:.1%} too large)"
    return f"{said}; {len(plan.problem.placed):,} buffers, {readable(plan.naive)} if nothing shared"


def readable(nbytes: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.4g} TiB"


def safe(text: str) -> str:
    return escape(_CONTROL.sub("\ufffd", text), {'"': "&quot;"})
