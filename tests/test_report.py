"""What a report says, from outcomes made by hand: counts, folding, diffs, data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fxopt
from fxopt.changes import changes, ranges, unified
from fxopt.listing import NAME, Line, Listing
from fxopt.outcome import Check, Outcome, Spot
from fxopt.report import Report
from fxopt.report_text import count, size
from fxopt.step_cost import StepCost

HUGE = StepCost(*[10**12 + 1] * 8)


def spot(layer: int, reason: str = "", node: str = "linear") -> Spot:
    return Spot(f"{node}_{7 * layer}", "modeling_llama.py:243", layer, reason)


def layer(number: int, *operators: str) -> Listing:
    """A layer that feeds each operator into the next."""
    names = [f"{operator}_{number}" for operator in operators]
    inputs = [f"layer_{number - 1}", *names]
    return tuple(
        Line(f"{NAME} = {operator}({NAME})", (name, source), number, "modeling.py:1", "", ())
        for operator, name, source in zip(operators, names, inputs, strict=False)
    )


def stages() -> list[Outcome]:
    before = tuple(line for number in range(20) for line in layer(number, "linear", "relu"))
    after = tuple(
        line
        for number in range(20)
        for line in layer(number, *(("linear", "relu") if number in (3, 17) else ("both",)))
    )
    refused = [spot(3, "linear_21: only k has a bias"), spot(17, "linear_119: only k has a bias")]
    merge = Outcome(
        "merge", expected=20, matched=18, refused=refused, step=HUGE, listing=after, ops={"aten.both.default": 18}
    )
    merge.verified = Check("", 1e-7, 1e-6, "K of layer 0")
    wrong = Outcome("wrong", matched=1, dropped="logits differ", listing=before[:2])
    stale = Outcome("stale", expected=20, near=[spot(n, f"relu_{n} is no gelu") for n in range(20)], listing=after)
    return [Outcome("capture", "capture", step=HUGE, listing=before), merge, wrong, stale]


@pytest.fixture
def report() -> Report:
    return Report("TinyForCausalLM", "inductor", 4096, context=2048, stages=stages(), seconds={"capture": 1.0})


def test_layers_are_named(report: Report) -> None:
    """Equal reasons once, with the layers that they hold for."""
    text = str(report)
    assert "merge: matched 18 of 20" in text
    assert "merge, layers 3, 17, modeling_llama.py:243 (2 alike): linear_21: only k has a bias" in text
    assert "stale: matched 0 of 20" in text
    assert "stale, layers 0-19, modeling_llama.py:243 (20 alike): relu_0 is no gelu" in text
    assert "wrong: dropped, logits differ" in text
    assert "merge: +18 both" in text


def test_nothing_is_wider_than_a_terminal(report: Report) -> None:
    assert max(map(len, str(report).splitlines())) <= 100


def test_a_dropped_pass_is_no_step_of_the_way(report: Report) -> None:
    assert report.before("merge").name == "capture"
    assert report.before("stale").name == "merge"
    assert "\nwrong  " not in str(report).split("One decode step")[1].split("Operators")[0]


def test_a_diff_folds_layers(report: Report) -> None:
    assert report.diff("merge") == (
        "@@ layers 0-2, 4-16, 18-19 (x18 alike) @@\n"
        "- linear_0 = linear(layer_-1)\n"
        "- relu_0 = relu(linear_0)\n"
        "+ both_0 = both(layer_-1)\n"
    )
    assert report.diff("stale") == "stale changed nothing\n"
    with pytest.raises(fxopt.InvalidRequestError, match="no pass named 'merges'; did you mean merge"):
        report.diff("merges")


def test_every_alike_layer_has_its_own_names(report: Report) -> None:
    folded = next(group for group in report.changes("merge") if len(group.layers) == 18)
    assert folded.names[folded.layers.index(16)] == ("linear_16", "layer_15", "both_16", "relu_16")
    assert folded.title == "layers 0-2, 4-16, 18-19 (x18 alike)"


def test_a_changed_line_faces_itself() -> None:
    """A line that kept its name stands beside what it was, not beside a new one."""
    old = Line(f"{NAME} = view({NAME})", ("view", "linear"), 0, "", "", ())
    new = Line(f"{NAME} = view({NAME})", ("view", "getitem"), 0, "", "", ())
    extra = Line(f"{NAME} = getitem({NAME})", ("getitem", "split"), 0, "", "", ())
    (group,) = changes((old,), (extra, new))
    assert [(row.before, row.after) for row in group.rows] == [(None, extra), (old, new)]
    assert (
        unified([group]) == "@@ layer 0 @@\n- view = view(linear)\n+ getitem = getitem(split)\n+ view = view(getitem)\n"
    )


def test_gaps_are_told() -> None:
    before = layer(0, *"abcdefghij")
    after = (*before[:4], Line(f"{NAME} = new()", ("new",), 0, "", "", ()), *before[4:])
    text = unified(changes(before, after), context=1)
    assert text == "@@ layer 0 @@\n  …\n  d_0 = d(c_0)\n+ new = new()\n  e_0 = e(d_0)\n"


@pytest.mark.parametrize(
    ("numbers", "text"), [([0], "0"), ([3, 1, 2], "1-3"), ([0, 1, 5, 7, 8], "0-1, 5, 7-8"), ([2, 2], "2")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_sizes_and_counts() -> None:
    sizes = [0, 512, 1023, 1024, 1536, 150 * 1024, 10**6, 2**20, 3 * 2**39]
    assert [size(n) for n in sizes] == ["0", "512", "1023", "1.0K", "1.5K", "150K", "977K", "1.0M", "1.5T"]
    assert [count(n) for n in (0, 999, 1000, 287_300_000, 7 * 10**13)] == ["0", "999", "1.0k", "287M", "70.0T"]


def test_as_data(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["schema"] == 2
    assert [stage["name"] for stage in data["stages"]] == ["capture", "merge", "wrong", "stale"]
    assert data["stages"][1]["refused"][0] == {
        "node": "linear_21",
        "source": "modeling_llama.py:243",
        "layer": 3,
        "reason": "linear_21: only k has a bias",
    }
    assert data["stages"][1]["step"]["weight_bytes"] == 10**12 + 1
    assert not any("listing" in stage for stage in data["stages"])


@pytest.mark.parametrize(("name", "start"), [("r.html", "<!doctype html>"), ("r.json", "{"), ("r.txt", "TinyFor")])
def test_saved(report: Report, tmp_path: Path, name: str, start: str) -> None:
    report.save(tmp_path / name)
    assert (tmp_path / name).read_text().startswith(start)
    with pytest.raises(fxopt.InvalidRequestError, match=r"ends in '.pdf'; a report is saved as .html, .json, .txt"):
        report.save(tmp_path / "r.pdf")
