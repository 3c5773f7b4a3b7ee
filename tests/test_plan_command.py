"""``fxopt plan MODEL`` and ``plan_model``: from a config alone to a table and to files that can be read again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from planned_configs import FAMILIES, LENGTH, Configs, configs, rewritten_once
from planned_models import MAX_LEN, inputs_of, specialised

from fxopt import planning
from fxopt.activation_dag import load, restored
from fxopt.activation_plan import plan_activations
from fxopt.arena import ArenaModule
from fxopt.cli import main
from fxopt.demo_model import DEMO, load_config
from fxopt.errors import InvalidRequestError
from fxopt.families import tiny
from fxopt.memory.references import itrex, tflite
from fxopt.planning import plan_model
from fxopt.shadow import shadow_replay


@pytest.fixture(autouse=True)
def _captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "rewritten", rewritten_once)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Configs:
    return configs(tmp_path_factory.mktemp("configs"))


Rows = dict[tuple[str, str], list[str]]


def tables(text: str) -> tuple[Rows, Rows]:
    """The plans, and what others would need."""
    plans, others = text.split("What others would need:")
    return rows(plans), rows(others)


def rows(text: str) -> Rows:
    """The cells of a table by graph and shapes; a graph is named in its first row."""
    found, graph = {}, ""
    for line in text.splitlines():
        if match := re.match(r"(prefill|decode|all graphs| {7})\s+(\S.*?)\s{2,}(.*)$", line):
            graph = match[1].strip() or graph
            found[graph, match[2]] = match[3].split()
    return found


def number(text: str) -> int:
    return int(text.replace(",", ""))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_enough(family: str, config: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    """No plan is above its lower bound, and what is printed is what a plan of the real model's graphs says."""
    assert main(["plan", config(family), *LENGTH]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{type(tiny(family)).__name__}, max_len {MAX_LEN}, float32, merge tables" in printed.out
    plans, others = tables(printed.out)
    assert plans.keys() == others.keys()
    bounds, most = [], 0
    for role in ("prefill", "decode"):
        if family == "llama":
            real = plan_activations(specialised(family, role, 1)).memory.plans
        else:  # which would take seconds to capture
            real = plan_model(config(family), MAX_LEN)[role].activations.memory.plans
        shown = [(place, cells) for place, cells in plans.items() if place[0] == role]
        assert len(shown) == len(real) + (len(real) > 1)
        for (place, cells), one in zip(shown, real, strict=False):
            assert [number(cells[0]), number(cells[1])] == [len(one.problem.placed), one.lower_bound]
            assert number(cells[2]) <= 1.001 * one.lower_bound
            assert cells[3:5] == [f"{number(cells[2]) / one.lower_bound:.4f}", "optimal"]
            naive, blocks, best_fit, buckets = map(number, others[place])
            assert (naive, blocks, best_fit) == (one.naive, itrex(one.problem).size, tflite(one.problem).size)
            assert naive > buckets >= number(cells[2])
            bounds.append(one.lower_bound)
            most = max(most, blocks)
    together = plans["all graphs", "in one arena"]
    assert number(together[0]) == max(bounds)
    assert number(together[1]) <= 1.01 * max(bounds)
    assert together[3] == "optimal"
    assert number(others["all graphs", "in one arena"][1]) == most


def test_what_is_not_the_smallest_is_said_to_be_so(config: Configs) -> None:
    """By the algorithm that loses the rest of a block, and by one table for all windows."""
    made = plan_model(config("llama"), MAX_LEN, solver="itrex")
    shown, _ = tables(str(made))
    arena, bound = made["prefill"].arena, made["prefill"].activations.memory.lower_bound
    assert arena == itrex(made["prefill"].activations.memory.plans[0].problem).size > bound
    assert " ".join(shown["prefill", "step 200, window 256"][3:]).startswith(
        f"{arena / bound:.4f} feasible, at most {arena / bound - 1:.2%} too large"
    )
    assert (made.status, made.gap) == ("feasible", arena / bound - 1)
    one_table, _ = tables(str(plan_model(config("llama"), MAX_LEN, merge="max")))
    assert len({cells[2] for place, cells in one_table.items() if place[1].startswith("window")}) == 1
    assert "feasible," in one_table["decode", "window 64"]
    assert "optimal" in one_table["decode", "all of these"]


def test_files_are_plans_of_the_real_model(config: Configs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made from a config alone, written, read again, and run with weights."""
    out = tmp_path / "activation_dag.yaml"
    shapes = ["--shapes", "prefill:step=32,window=128", "--shapes", "prefill:step=8,window=64", "--shapes", "decode"]
    assert main(["plan", config("llama"), *LENGTH, *shapes, "--merge", "order", "--out", str(out)]) == 0
    prefill, decode = (tmp_path / f"activation_dag.{name}.yaml" for name in ("prefill", "decode"))
    assert capsys.readouterr().err.splitlines() == [f"plan: {prefill}", f"plan: {decode}"]
    assert sorted(tmp_path.iterdir()) == [decode, prefill]
    program = specialised("llama", "prefill", 1)
    dag = load(prefill)
    assert [set(shapes) for shapes in dag.memory.values] == [{"step", "window"}] * 2
    module = ArenaModule(program.gm, restored(program, dag))
    for sizes in ({"step": 32, "window": 128}, {"step": 8, "window": 64}):
        assert shadow_replay(module, inputs_of(program, sizes)).differences == ()
    assert (module.stats["runs"], module.stats["shapes planned late"]) == (2, 0)
    assert module.arena.nbytes == dag.memory.arena
    assert len(restored(specialised("llama", "decode", 1), load(decode)).sets) == 4


def test_one_graph_has_one_file(config: Configs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "dag.yaml", tmp_path / "plan.svg"
    arguments = ["--shapes", "decode:window=128", "--out", str(out), "--svg", str(picture)]
    assert main(["plan", config("llama"), *LENGTH, *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"plan: {out}", f"picture: {picture}"]
    plans, _ = tables(printed.out)
    assert set(plans) == {("decode", "window 128")}
    assert load(out).memory.arena == number(plans["decode", "window 128"][2])


def test_what_is_left_out_of_a_set_is_as_usual(config: Configs) -> None:
    asked = {"prefill": [{"step": 16}, {"window": 64}], "decode": [{"batch": 4}, {"batch": 2, "window": 128}]}
    made = plan_model(config("llama"), MAX_LEN, shapes=asked)
    assert made["prefill"].shapes == ({"step": 16, "window": 256}, {"step": 64, "window": 64})
    assert made["decode"].shapes == ({"batch": 4, "window": 256}, {"batch": 2, "window": 128})
    several = plan_model(config("llama"), MAX_LEN, shapes={"decode": []}, batch=3)
    assert [shapes["batch"] for shapes in several["decode"].shapes] == [3] * 4
    assert several.arena > plan_model(config("llama"), MAX_LEN, shapes={"decode": []}).arena


def test_flags_reach_the_plan(config: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    """Other passes, another dtype and another batch make other tables."""
    options = ["--dtype", "bfloat16", "--batch", "2", "--no-window-kv", "--shapes", "prefill:step=32"]
    assert main(["plan", config("llama"), *LENGTH, *options]) == 0
    printed = capsys.readouterr().out
    assert "bfloat16" in printed
    assert set(rows(printed)) == {("prefill", "batch 2, step 32")}


def test_the_demo_model_needs_no_weights() -> None:
    assert load_config(DEMO).hidden_size == 576


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shapes", "draft:step=3"], "there is no graph 'draft' to plan; there are prefill, decode"),
        (["--shapes", "prefill:step"], "'step' in 'prefill:step' is no size; write --shapes GRAPH:AXIS=N,…"),
        (["--shapes", "prefill:=3"], "'=3' in 'prefill:=3' is no size"),
        (["--shapes", "prefill:step=3,"], "'' in 'prefill:step=3,' is no size"),
        (["--shapes", "prefill:step=many"], "step=many in 'prefill:step=many' is no size; give a whole number"),
        (["--shapes", "prefill:step=3,step=4"], "has two sizes for step; give one"),
        (["--shapes", "prefill:steps=3"], "prefill: steps=3: the graph has no steps; it has batch, step, logits,"),
        (["--shapes", "prefill:step=0"], "prefill: step=0 is no size; give a whole number from 1"),
        (["--shapes", "prefill:step=1"], "prefill: step=1: this graph takes two tokens or more at once"),
        (["--shapes", "prefill:step=65,window=64"], "prefill: step=65 is more than the 64 rows of the window"),
        (["--shapes", "prefill:window=257"], "prefill: window=257 is more than the 256 rows that the cache has at"),
        (["--shapes", "decode:step=2"], "decode: step=2 was asked for, but in this graph it is 1"),
        (["--shapes", "decode:batch=0"], "decode: batch=0 is no size"),
        (["--shapes", "decode:batch=1", "--shapes", "decode:batch=3"], "batch=1 and batch=3 were asked for"),
        (["--shapes", "decode", "--shapes", "decode:window=64"], "--shapes has decode alone, for its usual sets, and"),
        (["--max-len", "1000"], "max_len=1000"),
        (["--passes", "fuze_qkv"], "no pass named 'fuze_qkv'"),
    ],
)
def test_refusals(config: Configs, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, exit code 2, and no table."""
    assert main(["plan", config("llama"), *LENGTH, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.startswith("fxopt: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to plan; give a MODEL, or buffers with --csv FILE"),
        (["m", "--csv", "f"], "MODEL m and --csv f are two things to plan; give one of them"),
        (["m", "--capacity", "5"], "--capacity means nothing beside a MODEL; leave it out"),
        (["--csv", "f", "--shapes", "decode"], "--shapes means nothing beside --csv; leave it out"),
        (["--csv", "f", "--max-len", "5"], "--max-len means nothing beside --csv"),
        (["--csv", "f", "--no-rotary"], "--no-… means nothing beside --csv"),
        (["m", "--merge", "both"], "invalid choice: 'both'"),
        (["m", "--batch", "0"], "0 is too small; give at least 1"),
        (["m", "--budget", "-1"], "-1 is no time to search; give seconds above 0"),
    ],
)
def test_two_forms(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("MODEL", "--csv", "--shapes", "--merge", "--max-len", "--no-rotary"))


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert main(["plan", str(tmp_path)]) == 2
    assert "is of no causal LM" in capsys.readouterr().err


def test_python_refusals(config: Configs) -> None:
    with pytest.raises(InvalidRequestError, match="there is no graph to plan in shapes; name prefill or decode"):
        plan_model(config("llama"), MAX_LEN, shapes={})
    with pytest.raises(InvalidRequestError, match="prefill: batch=True is no size"):
        plan_model(config("llama"), MAX_LEN, batch=True)
    with pytest.raises(InvalidRequestError, match="prefill: window='64' is no size"):
        plan_model(config("llama"), MAX_LEN, shapes={"prefill": [{"window": "64"}]})  # type: ignore[dict-item]
