"""The picture of a step that streams: what runs, what is read meanwhile, and that it fits together."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from fxopt.offload.placement import place
from fxopt.offload.prediction import Prediction, Rates, predict
from fxopt.offload.timeline import LEFT, RIGHT, WIDTH, draw
from fxopt.offload.use import CacheUse

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = 8


def predicted(speed: float, slots: int = 2) -> tuple[CacheUse, Prediction]:
    """Layers of 100 bytes that take a second each; every other one is read at ``speed`` bytes per second."""
    placed = place([100] * LAYERS, resident=0.5, depth=slots)
    found = predict(placed.sizes, placed.offloaded, placed.slots, Rates(speed, (1.0,) * LAYERS))
    return CacheUse(placement=placed, store="disk", bandwidth=speed, predicted=found, context=10, row_bytes=10), found


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("speed", [25.0, 50.0, 100.0, 1e9])
def test_one_step_fits_together(speed: float, slots: int) -> None:
    use, found = predicted(speed, slots)
    runs = [one for one in found.timeline if not one.is_read]
    reads = [one for one in found.timeline if one.is_read]
    assert [one.layer for one in runs] == list(range(LAYERS))
    assert {one.layer for one in reads} == set(use.placement.offloaded)
    for lane in (runs, reads):
        assert all(one.end <= two.start + 1e-9 for one, two in pairwise(lane))
        assert all(-1e-9 <= one.start <= one.end <= found.step + 1e-6 for one in lane)
    assert sum(one.end - one.start for one in runs) == pytest.approx(LAYERS)
    assert sum(one.end - one.start for one in reads) == pytest.approx(min(found.copy, found.step), rel=0.01)


def test_waiting_is_a_gap() -> None:
    _, quick = predicted(1e9)
    _, slow = predicted(25.0)
    for found, waits in ((quick, False), (slow, True)):
        runs = [one for one in found.timeline if not one.is_read]
        gaps = runs[0].start + sum(two.start - one.end for one, two in pairwise(runs))
        assert gaps == pytest.approx(found.exposed, abs=1e-6)
        assert (gaps > 1.0) == waits


def test_the_picture_shows_every_span_where_it_is() -> None:
    use, found = predicted(50.0)
    root = ElementTree.fromstring(draw(use, 'a "step" <of> 1 & 2'))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class") != "sheet"]
    assert len(bars) == len(found.timeline)
    for bar, span in zip(bars, found.timeline, strict=True):
        left, width = float(str(bar.get("x"))), float(str(bar.get("width")))
        scale = (WIDTH - LEFT - RIGHT) / found.step
        assert left == pytest.approx(LEFT + span.start * scale, abs=0.01)
        assert width == pytest.approx((span.end - span.start) * scale, abs=0.02)
        streamed = "streamed" if span.layer in use.placement.offloaded else "runs"
        assert bar.get("class") == ("reads" if span.is_read else streamed)


def test_no_picture_where_nothing_is_streamed() -> None:
    placed = place([100] * LAYERS, budget=10_000)
    assert draw(CacheUse(placement=placed, store="disk", context=10, row_bytes=0), "nothing") == ""
