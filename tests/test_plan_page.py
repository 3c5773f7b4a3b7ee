"""The pictures of plans, and docs/memory-plan.md: what it says is what is."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from planned_configs import FAMILIES, LENGTH, Configs, configs, rewritten_once
from planned_models import MAX_LEN, inputs_of, specialised
from torch.profiler import ProfilerActivity, profile

from fxopt import planning
from fxopt.activation_plan import plan_activations
from fxopt.arena import ArenaModule
from fxopt.cli import main
from fxopt.families import tiny
from fxopt.memory.picture import HEADING, TOP
from fxopt.memory.references import itrex
from fxopt.planning import plan_model

PAGE = (Path(__file__).parent.parent / "docs" / "memory-plan.md").read_text()
OF_GRAPHS, OF_CODE = PAGE.split("## In compiled code")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "rewritten", rewritten_once)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Configs:
    return configs(tmp_path_factory.mktemp("configs"))


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures(family: str, config: Configs, tmp_path: Path) -> None:
    """Both plans on one scale, within their frames; pointing at a buffer shows layer and line of the model's code."""
    assert main(["plan", config(family), *LENGTH, "--svg", str(tmp_path / "plan.svg")]) == 0
    made = plan_model(config(family), MAX_LEN)
    for graph in made.graphs:
        one = max(graph.activations.memory.plans, key=lambda plan: plan.lower_bound)
        root = ElementTree.parse(tmp_path / f"plan.{graph.name}.svg").getroot()
        width, height = map(float, str(root.get("viewBox")).split()[2:])
        buffers = [shape for shape in root.iter(f"{SVG}rect") if "buffer" in str(shape.get("class"))]
        titles = ["".join(title.itertext()) for shape in buffers for title in shape.iter(f"{SVG}title")]
        names = [buffer.name for buffer in one.problem.placed]
        assert [title.split(" ")[0] for title in titles] == 2 * names
        sources = [re.search(rf"(outside of the layers|layer [01]), modeling_{family}\.py:\d+", t) for t in titles]
        assert all(sources), titles[sources.index(None)]
        assert {match[1] for match in sources if match} == {"outside of the layers", "layer 0", "layer 1"}
        assert any(re.search(r"linear\w* \[1, \d+, \d+\] float32: aten\.linear\.default, layer 1", t) for t in titles)
        half, places = len(buffers) // 2, [_edges(shape) for shape in buffers]
        assert all(left >= 0 and right <= width / 2 for left, right, _, _ in places[:half])
        assert all(width / 2 <= left and right <= width for left, right, _, _ in places[half:])
        assert all(HEADING + TOP - 0.01 <= top < bottom < height for _, _, top, bottom in places)
        floor = max(bottom for *_, bottom in places)
        greedy, exact = (floor - min(top for _, _, top, _ in half) for half in (places[:half], places[half:]))
        assert greedy / exact == pytest.approx(itrex(one.problem).size / one.size, rel=0.01)
        bounds = [line for line in root.iter(f"{SVG}line") if line.get("class") == "bound"]
        assert [floor - float(str(line.get("y1"))) for line in bounds] == [pytest.approx(exact, abs=0.02)] * 2


def _edges(shape: ElementTree.Element) -> tuple[float, float, float, float]:
    x, y, width, height = (float(str(shape.get(name))) for name in ("x", "y", "width", "height"))
    return x, x + width, y, y + height


def test_the_page_on_plans_says_what_is(
    config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Python runs, and its table of a file is what is printed."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": config("llama")}
    for block in re.findall(r"```python\n(.*?)```", OF_GRAPHS, re.DOTALL):
        exec(compile(block, "memory-plan.md", "exec"), names)
    assert {"activation_dag.decode.yaml", "plan.prefill.svg", "decode.yaml"} <= {p.name for p in tmp_path.iterdir()}
    assert names["activations"].memory.merge == "order"
    assert str((names["made"].offsets, names["made"].size, names["made"].status, names["made"].gap))[1:-1] in PAGE
    source, table = re.findall(r"```text\n(id,.*?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL)[0]
    Path("buffers.csv").write_text(source)
    capsys.readouterr()
    assert main(["plan", "--csv", "buffers.csv"]) == 0
    assert re.sub(r"\d\.\d\d s", "", capsys.readouterr().out) == re.sub(r"\d\.\d\d s", "", table)


@pytest.mark.slow
def test_the_page_on_compiled_code(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", OF_CODE, re.DOTALL)
    exec(compile(block, "memory-plan.md", "exec"), names := {"model": tiny("llama")})
    words = re.search(r"# … (one arena: )[\d.KMB]+(, 1\.000 of the least that is possible)", block)
    assert words is not None
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(words[1] + r"[\d.]+[KM]?B" + re.escape(words[2]), printed)
    assert names["fast"].fxopt.arena_bytes > 0


def allocations(graph: Callable[..., Any], inputs: list[torch.Tensor]) -> list[int]:
    """The bytes that PyTorch's allocator hands out and takes back, in order."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        graph(*inputs)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def test_freeing_early_needs_the_lower_bound_without_in_place() -> None:
    """What the page says of counting references, by PyTorch's own record of what its allocator hands out."""
    program, shapes = specialised("llama", "prefill", 1), {"step": 32, "window": 128}
    inputs = inputs_of(program, shapes)
    taken = allocations(program.gm, inputs)
    peak = max(accumulate(taken))
    apart = plan_activations(program, [shapes], in_place=False).memory
    assert apart.lower_bound <= peak <= 1.01 * apart.lower_bound
    assert f"{peak:,} bytes in both" in PAGE
    module = ArenaModule(program.gm, plan_activations(program, [shapes]))
    assert module.arena.nbytes < 0.9 * peak
    module(*inputs)
    before, after = (sum(nbytes > 0 for nbytes in found) for found in (taken, allocations(module, inputs)))
    assert f"{before} times in a run, and {after} times with an arena" in PAGE
