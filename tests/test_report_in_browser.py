"""What a person can do with the report's page, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import browser as driving
import pytest
from browser import DOWN, ENTER, ESCAPE, LEFT, RIGHT, TAB, Browser, browser
from report_samples import HOSTILE, deep, hostile

from fxopt.outcome import Outcome
from fxopt.report import Report

SELECTED = "#stages [aria-selected=true] .name"


@pytest.fixture(scope="module")
def report() -> Report:
    return deep()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if why := driving.missing():
        pytest.skip(why)
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.save(path)
    return path


@pytest.fixture
def opened(window: Browser, saved: Path) -> Iterator[Browser]:
    """The page, new; whatever a test does to it must not upset the console."""
    window.complaints()
    window.open(saved, "#stage=fuse_qkv")
    yield window
    assert window.complaints() == []


def test_it_opens_by_itself(opened: Browser, report: Report) -> None:
    assert opened.text("h1") == report.model
    assert opened.texts("#stages .name") == [stage.name for stage in report.stages]
    assert opened.text("h2#stage-title") == "fuse_qkv"
    assert opened.run("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize("width", [800, 1280, 1920])
def test_it_fits(opened: Browser, width: int) -> None:
    opened.resize(width, 1000)
    assert opened.run("return document.documentElement.scrollWidth <= innerWidth")
    spilling = (
        "return [...document.querySelectorAll('.cell code, .tile dd')].some((e) => e.scrollWidth > e.clientWidth + 1)"
    )
    assert not opened.run(spilling)
    opened.resize(1440, 1000)


def test_every_stage_is_reached_by_clicking(opened: Browser, report: Report) -> None:
    for number, stage in enumerate(report.stages):
        opened.click(f"#stages [data-stage='{number}']")
        shown_is(opened, report, stage)


def test_every_stage_is_reached_by_keys(opened: Browser, report: Report) -> None:
    opened.press("k" * len(report.stages))
    shown_is(opened, report, report.stages[0])
    for stage in report.stages[1:]:
        opened.press("j")
        shown_is(opened, report, stage)
    opened.click("#stages [data-stage='3']")
    opened.press(DOWN)
    shown_is(opened, report, report.stages[4])


def shown_is(window: Browser, report: Report, stage: Outcome) -> None:
    assert window.text("#stage-title") == window.text(SELECTED) == stage.name
    groups = report.changes(stage.name)
    assert window.count(".group") == len(groups)
    changed = {
        line.text
        for group in groups
        for row in group.rows
        if row.is_changed
        for line in (row.before, row.after)
        if line is not None
    }
    shown = window.run(
        "return [...document.querySelectorAll('.gone, .new, .changed')].map((found) => found.lastChild.textContent)"
    )
    assert {" ".join(text.split()) for text in changed} <= {" ".join(text.split()) for text in shown}


def test_bars_select_stages_too(opened: Browser, report: Report) -> None:
    opened.click("[data-chart=moved] .column:nth-child(3)")
    shown_is(opened, report, report.stages[2])
    opened.press(RIGHT)
    shown_is(opened, report, report.stages[3])
    before = opened.text("[data-chart=moved] .change")
    opened.click(".legend .weights")
    assert opened.text("[data-chart=moved] .change") != before


def test_folds_open(opened: Browser) -> None:
    lines = opened.count(".cell")
    opened.click(".fold")
    assert opened.count(".cell") > lines
    assert opened.run("return document.activeElement.className").startswith("cell")
    closed = opened.run("return document.querySelectorAll('.toggle[aria-expanded=false]').length")
    opened.click(".toggle[aria-expanded=false]")
    assert opened.run("return document.querySelectorAll('.toggle[aria-expanded=false]').length") == closed - 1


def test_another_of_the_alike_layers_is_shown_by_its_own_names(opened: Browser) -> None:
    assert "layers.17." not in opened.text("#graph")
    opened.run("const s = document.querySelector('.pick select'); s.value = 17; s.dispatchEvent(new Event('change'))")
    assert "model.layers.17.self_attn.q_proj.weight" in opened.text("#graph")
    assert "model.layers.0.self_attn.q_proj.weight" not in opened.text("#graph")


def test_a_line_shows_its_card_by_pointer(opened: Browser, report: Report) -> None:
    line = next(line for line in report["fuse_qkv"].listing if line.name == "linear_default")
    opened.hover(cell_of(opened, line.name))
    card = opened.text("#card")
    assert all(told in card for told in (line.value, line.source, "fuse_qkv", "split_with_sizes_default"))
    assert opened.count("#graph .is-used") == 2  # where it is made, and in the split that reads it


def test_a_line_shows_its_card_by_key(opened: Browser) -> None:
    opened.click(cell_of(opened, "linear_default"))
    opened.press(DOWN)
    assert "split_with_sizes" in opened.text("#card .card-line")
    opened.press(ENTER)
    assert opened.run("return document.activeElement.closest('#card') !== null")
    opened.press(ESCAPE)
    assert opened.run("return document.activeElement.matches('.cell')")
    opened.press(LEFT)  # nothing faces it there
    assert "split_with_sizes" in opened.text("#card .card-line")


def cell_of(window: Browser, name: str) -> str:
    """A selector for the line that defines a name."""
    script = """const made = [...document.querySelectorAll(".def")].find((word) => word.textContent === arguments[0]);
        made.closest(".cell").id = "wanted";"""
    window.run(script, name)
    return "#wanted"


def test_changes_are_stepped_through_by_keys(opened: Browser) -> None:
    places = []
    for _ in range(3):
        opened.press("n")
        places.append(opened.run("return document.activeElement.textContent"))
    opened.press("p")
    assert len(set(places)) == 3
    assert opened.run("return document.activeElement.textContent") == places[1]


def test_search_finds_a_node_of_a_folded_layer(opened: Browser) -> None:
    opened.press("/linear_default_1_of_17")
    opened.wait("document.querySelector('.hit')")
    assert opened.run("return document.querySelector('.hit').textContent").count("layer 17") == 1
    opened.press(ENTER)
    assert opened.text("#stage-title") == "fuse_qkv"
    assert "linear_default_1_of_17" in opened.run("return document.activeElement.textContent")


def test_search_finds_source_lines_and_other_stages(opened: Browser, report: Report) -> None:
    opened.press("/index_copy")
    opened.wait("document.querySelector('.hits-head.apart')")
    assert "static_kv" in opened.texts(".hits-head b")
    source = next(line.source for line in report["fuse_qkv"].listing if line.name == "linear_default")
    opened.run("document.querySelector('#search').value = ''")
    opened.press(source)
    opened.wait("[...document.querySelectorAll('.hit .source')].some((s) => s.textContent === arguments[0])", source)
    opened.press(ESCAPE)
    assert opened.run("return document.querySelector('#search').value") == ""
    assert not opened.run("return document.querySelector('#hits').checkVisibility()")


def test_the_theme_can_be_switched_and_is_kept(opened: Browser, saved: Path) -> None:
    def background() -> str:
        return str(opened.run("return getComputedStyle(document.body).backgroundColor"))

    opened.prefer("light")
    light = background()
    opened.prefer("dark")
    dark = background()
    assert light != dark
    opened.click("#theme")
    assert background() == light
    opened.open(saved)
    assert background() == light
    opened.run("localStorage.clear()")


def test_the_first_tab_skips_to_the_graph(opened: Browser) -> None:
    opened.press(TAB)
    assert opened.run("return document.activeElement.className") == "skip"
    opened.press(ENTER)
    assert opened.run("return document.activeElement.id") == "graph"


def test_hostile_names_do_nothing(window: Browser, report: Report, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    spoiled = hostile(report)
    spoiled.save(path)
    window.complaints()
    window.open(path)
    for number in range(len(spoiled.stages)):
        window.click(f"#stages [data-stage='{number}']")
        window.run("for (const closed of document.querySelectorAll('details')) closed.open = true")
        window.run("document.querySelector('.cell:not(.none)')?.focus()")
    window.press("/onerror")
    window.wait("document.querySelector('.hit')")
    assert window.run("return document.querySelector('h1').textContent") == HOSTILE
    assert window.count("img, b b") == 0
    assert window.run("return window.hacked === undefined && document.scripts.length === 2")
    assert window.complaints() == []


def test_passes_that_failed_and_empty_reports_can_be_shown(window: Browser, report: Report, tmp_path: Path) -> None:
    failed = replace(report.stages[3], listing=(), dropped="it failed with ValueError: no", step=None, verified=None)
    stages = [*report.stages[:3], failed, *report.stages[4:]]
    for name, shown in (("failed", stages), ("empty", [])):
        path = tmp_path / f"{name}.html"
        replace(report, stages=shown, checks=[], launches={}, seconds={}).save(path)
        window.complaints()
        window.open(path)
        assert window.complaints() == []
        assert window.count("#stages .stage") == len(shown)
        if shown:
            assert window.text(SELECTED) == failed.name  # what went wrong is shown first
            assert "no graph" in window.text("#graph")
            assert "it failed with ValueError: no" in window.text(".banner")
