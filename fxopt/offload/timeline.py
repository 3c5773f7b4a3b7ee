"""One step as a picture: time to the right, layers that run above, layers that are read below."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from fxopt.offload.amounts import told
from fxopt.offload.prediction import Prediction, Span
from fxopt.offload.use import StreamUse

WIDTH, HEIGHT = 1000, 190
LEFT, RIGHT = 78, 40
RUNS, READS, BAR = 66, 110, 30  # where the two rows begin, and how high they are
AXIS = 158
TICKS = 5
LETTER = 7  # pixels of a digit

# Every colour is said twice, since not every program that shows SVG knows light-dark().
_STYLE = """
:root { color-scheme: light dark; }
.timeline { font: 12px system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
.timeline .sheet { fill: #ffffff; fill: light-dark(#ffffff, #151a21); }
.timeline text { fill: #1b2230; fill: light-dark(#1b2230, #dfe5ee); }
.timeline .faint { fill: #525d6e; fill: light-dark(#525d6e, #9ba8b9); }
.timeline .name { font-size: 10.5px; pointer-events: none; fill: #10151f; fill: light-dark(#10151f, #f2f5fa); }
.timeline .grid { stroke: #dde1e7; stroke: light-dark(#dde1e7, #2a323d); }
.timeline rect { stroke: #ffffff; stroke: light-dark(#ffffff, #151a21); stroke-width: 0.7; }
.timeline .runs { fill: #b5bcc6; fill: light-dark(#b5bcc6, #566170); }
.timeline .streamed { fill: #7fa8dc; fill: light-dark(#7fa8dc, #3d6aa8); }
.timeline .reads { fill: #8cc7b5; fill: light-dark(#8cc7b5, #2f7a68); }
"""


def draw(use: StreamUse, title: str) -> str:
    """An SVG that needs nothing else; empty where no step was predicted."""
    found = use.predicted
    if found is None or not found.timeline:
        return ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="timeline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="sheet" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text class="faint" x="{LEFT}" y="44">{escape(_summary(use, found))}</text>',
        *_ticks(found.step),
        f'<text class="faint" x="{LEFT - 10}" y="{RUNS + 20}" text-anchor="end">layers run</text>',
        f'<text class="faint" x="{LEFT - 10}" y="{READS + 20}" text-anchor="end">are read</text>',
    ]
    for span in found.timeline:
        parts += _bar(span, found.step, span.layer in use.placement.offloaded)
    return "\n".join([*parts, "</svg>", ""])


def _summary(use: StreamUse, found: Prediction) -> str:
    return (
        f"predicted: {_ms(found.step)}, {_ms(found.exposed)} of it waiting; {told(found.moved)} read at "
        f"{use.bandwidth / 2**30:.2f} GiB/s in {_ms(found.copy)}, through {use.placement.slots} slots"
    )


def _bar(span: Span, step: float, is_streamed: bool) -> Iterator[str]:
    left, right = _x(span.start, step), _x(min(span.end, step), step)
    top, kind = (READS, "reads") if span.is_read else (RUNS, "streamed" if is_streamed else "runs")
    what = "is read" if span.is_read else "runs, out of a slot" if is_streamed else "runs"
    yield (
        f'<rect class="{kind}" x="{left:.2f}" y="{top}" width="{max(0.0, right - left):.2f}" height="{BAR}">'
        f"<title>layer {span.layer} {what}: {_ms(span.start)} to {_ms(span.end)}</title></rect>"
    )
    if right - left > LETTER * len(str(span.layer)):
        yield f'<text class="name" x="{(left + right) / 2:.2f}" y="{top + 19}" text-anchor="middle">{span.layer}</text>'


def _ticks(step: float) -> Iterator[str]:
    for tick in range(TICKS + 1):
        seconds = step * tick / TICKS
        x = _x(seconds, step)
        yield f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{RUNS - 8}" y2="{AXIS}"/>'
        yield f'<text class="faint" x="{x:.2f}" y="{AXIS + 16}" text-anchor="middle">{_ms(seconds)}</text>'


def _x(seconds: float, step: float) -> float:
    return LEFT + seconds / step * (WIDTH - LEFT - RIGHT)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
