"""The file of a plan: what it says, there and back, and every way in which it may be broken."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from planned_models import CHUNK, inputs_of, specialised
from torch import Tensor
from traced import layouts, traced

from fxopt.activation_dag import ActivationDAG, activation_dag, dump, from_text, load, restored, to_text
from fxopt.activation_plan import plan_activations, plan_graph
from fxopt.arena import ArenaModule
from fxopt.memory import PlanError
from fxopt.shadow import shadow_replay
from fxopt.shape_sets import default_shape_sets

aten = torch.ops.aten
SETS = [{"step": 8, "window": 64}, {"step": 32, "window": 128}]


@cache
def of_llama(role: str = "prefill", merge: str = "tables") -> ActivationDAG:
    program = specialised("llama", role, 1)
    sets = SETS if role == "prefill" else default_shape_sets(program, CHUNK)
    return activation_dag(program.gm, plan_activations(program, sets, merge=merge))  # type: ignore[arg-type]


def small() -> ActivationDAG:
    def best(x: Tensor) -> Any:
        found = aten.topk.default(aten.neg.default(aten.cat.default([x, x])), 2)
        return aten.add.Tensor(aten.transpose.int(found[0], 0, 1), 1.0)

    gm = traced(best)
    return activation_dag(gm, plan_graph(gm, [layouts(torch.randn(n, 4)) for n in (2, 4)]))


def test_what_the_file_says() -> None:
    dag = small()
    assert list(dag.operators) == [
        "cat_default",
        "neg_default",
        "topk_default",
        "getitem",
        "transpose_int",
        "add_tensor",
    ]
    topk = dag.operators["topk_default"]
    assert topk.topological_order == 2
    assert topk.input["neg_default"].alloc_bytes == 8 * 4 * 4  # of the larger set
    assert {name: (one.alloc_bytes, one.dtype, one.shape) for name, one in topk.output.items()} == {
        "topk_default.0": (64, "fp32", (8, 2)),
        "topk_default.1": (128, "s64", (8, 2)),
    }
    assert dag.operators["transpose_int"].output["transpose_int"].semantic_alias == "topk_default.0"
    assert dag.in_place == {"cat_default_inplace": ("cat_default", "neg_default")}
    document = yaml.safe_load(to_text(dag))
    assert set(document) == {"ActivationDAG", "MemoryPlan"}
    assert set(document["ActivationDAG"]) == {"ActivationOperator", "InplaceAliasHolder"}
    assert document["ActivationDAG"]["InplaceAliasHolder"] == {
        "cat_default_inplace": {"cat_default": None, "neg_default": None}
    }
    assert set(document["MemoryPlan"]["buffers"]) == {"cat_default", "topk_default.0", "topk_default.1"}


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("merge", ["tables", "max", "order"])
def test_there_and_back(tmp_path: Path, role: str, merge: str) -> None:
    dag = of_llama(role, merge)
    path = dump(dag, tmp_path / "activation_dag.yaml")
    again = load(path)
    assert again.operators == dag.operators
    assert again.in_place == dag.in_place
    assert [plan.offsets for plan in again.memory.plans] == [plan.offsets for plan in dag.memory.plans]
    assert _facts(again) == _facts(dag)


def _facts(dag: ActivationDAG) -> Any:
    """All that the file says; pairs of an order are in no order of their own."""
    document = yaml.safe_load(to_text(dag))
    document["MemoryPlan"].get("order", []).sort()
    return document


def test_sizes_are_expressions_in_the_file() -> None:
    buffers = yaml.safe_load(to_text(of_llama()))["MemoryPlan"]["buffers"]
    assert buffers["embedding"]["bytes"] == "256*step"
    assert buffers["arange_3"]["bytes"] == "8*window"


@pytest.mark.parametrize("merge", ["tables", "max", "order"])
def test_a_graph_runs_by_the_plan_of_a_file(merge: str) -> None:
    program = specialised("llama", "prefill", 1)
    module = ArenaModule(program.gm, restored(program, from_text(to_text(of_llama(merge=merge)))))
    for shapes in (*SETS, {"step": 16, "window": 128}):
        module.arena.poison()
        inputs = inputs_of(program, shapes)
        replay = shadow_replay(module, inputs)
        assert replay.differences == ()
        torch.testing.assert_close(replay.results[0], program.gm(*inputs)[0])
    assert module.stats["shapes planned late"] == 1
    assert module.stats["arena grown"] == 0


@pytest.mark.parametrize(("family", "role"), [("llama", "decode"), ("gemma2", "prefill")])
def test_the_plan_of_another_graph_is_refused(family: str, role: str) -> None:
    with pytest.raises(PlanError, match="the plan was made for another graph"):
        restored(specialised(family, role, 1), of_llama())


def test_a_plan_with_other_places_taken_is_refused() -> None:
    program = specialised("llama", "prefill", 1)
    text = to_text(activation_dag(program.gm, plan_activations(program, SETS, in_place=False)))
    edited = text.replace("InplaceAliasHolder: {}", "InplaceAliasHolder: {embedding_inplace: {embedding: null}}")
    assert edited != text
    with pytest.raises(PlanError, match="the plan was made for another graph"):
        restored(program, from_text(edited))


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return edit


OPERATORS = ("ActivationDAG", "ActivationOperator")
NEG = (*OPERATORS, "neg_default", "output", "neg_default")


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda document: document.pop("ActivationDAG"), "has a plan and no ActivationDAG"),
        (lambda document: document.pop("MemoryPlan"), "the document has no 'MemoryPlan'"),
        (_set("Extra", to=1), "has 'Extra', which means nothing there"),
        (_set(*OPERATORS, to=[]), r"ActivationOperator should be a table, and is \[\]"),
        (_set(*OPERATORS, "neg_default", to=None), "neg_default should be a table, and is None"),
        (_set(*OPERATORS, "neg_default", "topological_order", to=-1), "topological_order should be a whole number"),
        (_set(*OPERATORS, "neg_default", "topological_order", to=True), "topological_order should be a whole number"),
        (_set(*OPERATORS, "neg_default", "topological_order", to=0), "both have topological_order 0"),
        (
            _set(*OPERATORS, "neg_default", "topological_order", to=99),
            "topk_default reads neg_default, which no op before",
        ),
        (_set(*NEG, "alloc_bytes", to=2**70), "alloc_bytes should be a whole number from 0 to"),
        (_set(*NEG, "alloc_bytes", to=1.5), "alloc_bytes should be a whole number"),
        (_set(*NEG, "dtype", to="fp7"), "dtype should be one such as fp32, bf16 or s64, and is 'fp7'"),
        (_set(*NEG, "shape", to="8x4"), "shape should be a list"),
        (_set(*NEG, "shape", to=[1] * 65), "has 65 entries, and should have 0 to 64"),
        (_set(*NEG, "shape", to=[-8]), "a size should be a whole number"),
        (_set(*NEG, "semantic_alias", to="nobody"), "neg_default lies in nobody, which no op up to neg_default makes"),
        (_set(*NEG, "weight", to=1), "has 'weight', which means nothing there"),
        (_set("ActivationDAG", "InplaceAliasHolder", "a_inplace", to={"a": None}), "holds a, which no op makes"),
        (
            _set("ActivationDAG", "InplaceAliasHolder", "add_tensor_inplace", to={"add_tensor": None}),
            "a holder is named after its first tensor, which has a place",
        ),
        (_set("ActivationDAG", "InplaceAliasHolder", to=3), "InplaceAliasHolder should be a table, and is 3"),
        (_set("MemoryPlan", "version", to=99), "has version 99"),
    ],
)
def test_broken_files_are_refused(edit: Callable[[dict[str, Any]], object], sentence: str) -> None:
    document = yaml.safe_load(to_text(small()))
    edit(document)
    with pytest.raises(PlanError, match=sentence):
        from_text(yaml.safe_dump(document))


def test_a_plan_in_which_buffers_overlap_is_refused() -> None:
    document = yaml.safe_load(to_text(small()))
    for one in document["MemoryPlan"]["sets"]:
        one["offsets"] = dict.fromkeys(one["offsets"], 0)
    with pytest.raises(PlanError, match="needed at the same time and share bytes"):
        from_text(yaml.safe_dump(document))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe\x00", "is no text"),
        (b"ActivationDAG: [", "is no YAML"),
        (b"- 1", "is a list, and not a table"),
        (b"a: &x [1]\nb: *x", "refers to itself"),
        (b"a: 1\na: 2", "'a' is there twice"),
        (b"a: !!python/object/apply:os.system ['true']", "is no YAML"),
        (b"a: " + b"[" * 5_000, "nested more than"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "activation_dag.yaml"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=sentence):
        load(path)


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dump(small(), tmp_path / "activation_dag.yaml")
    monkeypatch.setattr("fxopt.activation_dag.LONGEST_FILE", 100)
    with pytest.raises(PlanError, match=re.escape(f"{path} has more than 100 bytes")):
        load(path)
