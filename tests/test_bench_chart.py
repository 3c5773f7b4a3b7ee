"""Pictures of sweeps: what is drawn where, and that nothing is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import browser
import pytest
from bench_fakes import figure, results

from fxopt.bench.chart import PANEL_HEIGHT, PANEL_WIDTH, Panel, draw, ticks
from fxopt.bench.pictures import DRAWN, panels, title, varied
from fxopt.bench.setting import settings

SVG = "{http://www.w3.org/2000/svg}"
LINES = {"stock <eager>": [(1, 10.0), (4, 20.0), (16, 40.0)], "fxopt": [(16, 80.0), (1, 20.0)], "one point": [(4, 5.0)]}


def drawn(*panels: Panel, title: str = "Decode & more") -> ElementTree.Element:
    return ElementTree.fromstring(draw(panels, title))


def lines(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = [str(line.get("points")).split() for line in root.iter(f"{SVG}polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in found]  # type: ignore[misc]


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_values_have_their_places() -> None:
    root = drawn(Panel("Decode", "sequences", "tokens/s", LINES))
    stock, fast = lines(root)
    assert stock[1][0] - stock[0][0] == pytest.approx(stock[2][0] - stock[1][0], abs=0.2), "by powers"
    assert (stock[0][1] - stock[2][1]) / (stock[0][1] - stock[1][1]) == pytest.approx(3, abs=0.02)
    assert [x for x, _ in fast] == [stock[0][0], stock[2][0]], "in order"
    assert fast[0][1] == stock[1][1]
    circles = [circle for circle in root.iter(f"{SVG}circle") if circle.get("class", "").startswith("dot")]
    assert len(circles) == 6
    assert all(0 < float(str(circle.get("cx"))) < PANEL_WIDTH for circle in circles)
    said = ["".join(one.itertext()) for one in root.iter(f"{SVG}title")]
    assert said[0] == "stock <eager>\nsequences 1: 10 tokens/s"
    assert {"Decode & more", "Decode", "sequences", "tokens/s", "1", "4", "16", "stock <eager>"} <= set(texts(root))


def test_near_sizes_are_drawn_as_they_are() -> None:
    (line,) = lines(drawn(Panel("", "x", "y", {"a": [(100, 1), (200, 1), (800, 1)]})))
    assert (line[2][0] - line[0][0]) / (line[1][0] - line[0][0]) == pytest.approx(7, abs=0.05)


def test_colours_are_of_names() -> None:
    """Also where a panel lacks a line."""
    root = drawn(Panel("a", "x", "y", LINES), Panel("b", "x", "y", {"fxopt": LINES["fxopt"]}))
    classes = [str(line.get("class")) for line in root.iter(f"{SVG}polyline")]
    assert classes == ["line stroke-0", "line stroke-1", "line stroke-1"]


def test_panels_are_laid_out_in_rows() -> None:
    root = drawn(*[Panel(str(n), "x", "y", LINES) for n in range(3)])
    width, height = map(float, str(root.get("viewBox")).split()[2:])
    assert width == 2 * PANEL_WIDTH
    assert 2 * PANEL_HEIGHT < height < 3 * PANEL_HEIGHT
    assert [line[0][0] > PANEL_WIDTH for line in lines(root)] == [False, False, True, True, False, False]


def test_what_was_not_measured() -> None:
    assert "not measured" in texts(drawn(Panel("Decode", "x", "y", {})))


@pytest.mark.parametrize(
    ("highest", "found"),
    [
        (10.6, [0, 2, 4, 6, 8, 10]),
        (0.0073, [0, 0.002, 0.004, 0.006]),
        (2600, [0, 500, 1000, 1500, 2000, 2500]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round(highest: float, found: list[float]) -> None:
    assert ticks(highest) == found


# --- sweeps --------------------------------------------------------------------------------------


def test_what_varies_goes_to_the_right() -> None:
    assert varied(settings([1, 2, 4], [100, 200], [8])) == "batch"
    assert varied(settings([1], [100, 200], [8])) == "prompt"
    assert varied(settings([1], [100], [8])) is None


def test_a_sweep_has_panels_for_the_other_sizes() -> None:
    swept = settings([1, 2, 4], [100, 200], [8])
    found = results(*(figure(setting=one, decode_tok_s=one.batch * one.prompt, peak_mb=9) for one in swept))
    drawn = panels(found, "batch")
    assert [panel.title for panel in drawn] == [f"{what}, prompt {n}" for n in (100, 200) for what, *_ in DRAWN]
    assert drawn[0].lines == {"fxopt": [(1, 100), (2, 200), (4, 400)]}
    assert drawn[4].lines == {"fxopt": [(1, 200), (2, 400), (4, 800)]}
    assert drawn[2].lines == {}, "nobody measured prefill"
    assert title(found) == "tiny, float32, 8 new tokens"


# --- looked at -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def test_nothing_is_cut_off_or_written_over(window: browser.Browser, tmp_path: Path) -> None:
    """Long names, two sizes that vary, and sizes that lie close together."""
    names = [
        "StaticCache + torch.compile",
        "DynamicCache + torch.compile",
        "remove_control_flow + static_kv",
        "stock eager",
    ]
    close = [1000, 1010, 1020, 4000, 64000]
    panel = Panel(
        "Overall, prompt 10000, 1000 new tokens",
        "tokens in the cache", "ms for a token of each",
        {name: [(x, 1e5 * (place + 1)) for x in close] for place, name in enumerate(names)},
    )  # fmt: skip
    path = tmp_path / "picture.svg"
    path.write_text(draw([panel, panel, panel], "A model with a name, float32, 64 new tokens"))
    window.open(path)
    boxes = window.run(
        "return [...document.querySelectorAll('text')].map((t) => {const b = t.getBBox();"
        " return [t.textContent, b.x, b.x + b.width, b.y, b.y + b.height]})"
    )
    _, _, width, height = window.run("return document.documentElement.getAttribute('viewBox').split(' ').map(Number)")
    assert len(boxes) > 30
    assert [text for text, left, right, _, _ in boxes if left < 0 or right > width] == []
    assert max(bottom for *_, bottom in boxes) <= height
    overlapping = [
        (one[0], other[0])
        for place, one in enumerate(boxes)
        for other in boxes[:place]
        if one[1] < other[2] and other[1] < one[2] and one[3] + 2 < other[4] and other[3] + 2 < one[4]
    ]
    assert overlapping == []
