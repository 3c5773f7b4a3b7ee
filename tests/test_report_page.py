"""The report as a page: what is in the file. What a browser makes of it is tested beside this."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from report_samples import HOSTILE, LAYERS, deep, hostile

from fxopt.listing import Line
from fxopt.outcome import Check
from fxopt.report import Report
from fxopt.report_page import NOTHING, as_page


@pytest.fixture(scope="module")
def report() -> Report:
    return deep()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return as_page(report)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1], parse_constant=pytest.fail)
    return data


def test_it_is_one_file_that_asks_for_nothing_else(page: str) -> None:
    assert len(page.encode()) < 3e6
    assert not re.search(r"\w+://|@import|url\(", page)
    targets = {target for _, target in re.findall(r"\b(src|href)=[\"']?([^\"' >]*)", page)}
    assert all(target.startswith(("#", "data:,")) for target in targets)


def test_the_same_report_makes_the_same_page(report: Report, page: str) -> None:
    assert as_page(report) == page


def test_its_policy_lets_only_its_own_style_and_script_in(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    for tag, directive in (("<style>", "style-src"), ('<script type="module">', "script-src")):
        text = page.split(tag)[1].split("</")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy[1]


def test_alike_layers_are_told_once_with_their_names(report: Report, page: str) -> None:
    data = data_of(page)
    group = group_of(data)
    assert group["layers"] == list(range(LAYERS))
    assert len(set(data["strings"])) == len(data["strings"])
    after = [text for _, text in facing(data, group, layer=17) if text]
    assert after == [line.text for line in report["fuse_qkv"].listing if line.layer == 17]


def test_a_line_that_was_only_changed_faces_itself(page: str) -> None:
    data = data_of(page)
    views = [row for row in facing(data, group_of(data)) if any(text.startswith("view") for text in row)]
    assert len(views) == 3
    assert all(before.split(" = ")[0] == after.split(" = ")[0] for before, after in views)


def group_of(data: dict[str, Any]) -> dict[str, Any]:
    """The layers, after the pass that changes all of them alike."""
    stage = next(stage for stage in data["stages"] if stage["name"] == "fuse_qkv")
    group: dict[str, Any] = stage["groups"][-1]
    return group


def facing(data: dict[str, Any], group: dict[str, Any], layer: int = 0) -> list[tuple[str, str]]:
    """The rows of a group as text, as the page's script puts it together."""
    names = [data["strings"][name] for name in group["names"][layer]]

    def text(number: int) -> str:
        if number == NOTHING:
            return ""
        template, _, _, _, slots = data["lines"][number]
        return Line(data["strings"][template], tuple(names[slot] for slot in slots), layer, "", "", ()).text

    return [(text(before), text(after)) for before, after in group["rows"]]


def test_what_the_model_says_cannot_leave_the_data(report: Report) -> None:
    page = as_page(hostile(report))
    assert data_of(page)["report"]["model"] == HOSTILE
    assert "<img" not in page
    assert page.count("</script>") == 2
    assert not re.search("[<>&\u2028]", page.split('type="application/json">')[1].split("</script>")[0])


def test_numbers_that_json_lacks_go_as_text(report: Report) -> None:
    broken = replace(report, checks=[Check("a graph that fails", math.inf, math.nan)])
    assert data_of(as_page(broken))["report"]["checks"][0]["error"] == "inf"
