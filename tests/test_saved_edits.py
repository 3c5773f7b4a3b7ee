"""Edits by somebody who can compute a hash, but has no key."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import edit, inside_of, replace

import fxopt
from fxopt import ArtifactError
from fxopt.families import tiny

pytestmark = pytest.mark.usefixtures("home")


def _node(data: Any, name: str) -> Any:
    return next(node for node in data["nodes"] if node.get("call", "").startswith(name) or node["name"] == name)


def _set(node: str, **values: Any) -> Callable[[Any], None]:
    return lambda data: _node(data, node).update(values)


EVIL = "x: print('run')"

GRAPHS: list[tuple[Callable[[Any], None], str]] = [
    (_set("aten.linear", call="os.system"), "not among the operators"),
    (_set("aten.linear", call="builtins.exec.default"), "not among the operators"),
    (_set("aten.linear", call="aten.from_file.default"), "not among the operators"),
    (_set("aten.linear", call="aten.__class__.default"), "not known here"),
    (_set("aten.linear", call="aten._unsafe_view.default"), "not among the operators"),
    (_set("aten.linear", call="aten.linear.__init__"), "not known here"),
    (_set("aten.linear", call="quantized.linear.default"), "not among the operators"),
    (_set("aten.linear", call=["aten.linear.default"]), "should be a text"),
    (_set("aten.linear", args=[{"node": 100000}]), "should be the number of an earlier node"),
    (_set("aten.linear", args=[{"node": -1}]), "should be the number of an earlier node"),
    (_set("aten.linear", args=[{"node": True}]), "should be a whole number"),
    (_set("aten.linear", args=["/etc/passwd"]), "should be one of the words"),
    (_set("aten.linear", args=[{"eval": "1"}]), "should be an argument"),
    (_set("aten.linear", kwargs={EVIL: 1}), "should be arguments of"),
    (_set("aten.linear", name=EVIL), "should be a plain name"),
    (_set("aten.linear", name="input_ids"), "should be a name of its own"),
    (_set("aten.linear", name="print"), "a name that no function of Python has"),
    (_set("aten.linear", path="\n" + EVIL), "should be a plain name"),
    (_set("aten.linear", source="\n" + EVIL), "should be a plain name"),
    (_set("aten.linear", made_by=["\n" + EVIL]), "should be a plain name"),
    (_set("input_ids", name=EVIL), "should be a plain name"),
    (_set("key_0", input={"dtype": "float32", "shape": [2, 2, 10**9, 16]}), "should be a buffer of"),
    (_set("key_0", input={"dtype": "Tensor", "shape": []}), "should be a dtype"),
    (_set("key_0", input={"dtype": "float32", "shape": ["s0+1"]}), "should be sizes"),
    (lambda data: data["sizes"].update({"a b": 3}), "under a plain name"),
    (lambda data: data["sizes"].update({"a": 0}), "a size of two or more"),
    (lambda data: data.update(results=[1]), "should be a list of nodes"),
    (lambda data: data.update(nodes=None), "should be a list"),
    (lambda data: data["nodes"].append(data["nodes"][0] | {"name": "late"}), "is an input behind a call"),
    (lambda data: _weight(data).update(weight='a").b'), "should be a plain name"),
    (lambda data: _weight(data).update(weight="not.there"), "a graph that reads known weights"),
    (lambda data: _write_into_a_weight(data), "writes into a weight of the model"),
]


def _weight(data: Any) -> Any:
    return next(node for node in data["nodes"] if "weight" in node)


def _write_into_a_weight(data: Any) -> None:
    number = next(place for place, node in enumerate(data["nodes"]) if "weight" in node)
    data["nodes"].append({"name": "evil", "call": "aten.zero_.default", "args": [{"node": number}]})


@pytest.mark.parametrize(("change", "complaint"), GRAPHS)
def test_graphs_that_were_edited(saved: Path, change: Callable[[Any], None], complaint: str) -> None:
    edit(saved, "graph.json", change)
    with pytest.raises(ArtifactError, match="you did not save this folder"):
        fxopt.load(saved, tiny("llama"))
    for code in ("trusted", "again"):
        with pytest.raises(ArtifactError, match=complaint):
            fxopt.load(saved, tiny("llama"), code=code)


MANIFESTS: list[tuple[str, Callable[[Any], None], str]] = [
    ("manifest.json", lambda m: m["keys"]["options"].update(max_len=128), "facts should be what the options say"),
    ("manifest.json", lambda m: m["keys"]["options"].update(backend="exec"), "should be one of"),
    ("manifest.json", lambda m: m["keys"]["config"].update(hidden_size=65), "config.hidden_size differs"),
    ("manifest.json", lambda m: m["keys"].pop("weights"), "weights differs: nothing when it was saved"),
    ("manifest.json", lambda m: m["facts"].update(output_class="os._Environ"), "a class of outputs"),
    ("manifest.json", lambda m: m["facts"].update(output_class="antigravity.x"), "a class of outputs"),
    ("manifest.json", lambda m: m["facts"].update(capacity=2**40), "facts should be what the options say"),
    ("manifest.json", lambda m: m["roles"][0].update(folder="../.."), "lists no ../../graph.json"),
    ("manifest.json", lambda m: m["roles"][0]["plan"]["steps"][0].update(reads=[999]), "read what was made before"),
    ("manifest.json", lambda m: m["roles"][0]["plan"].update(results=[999]), "a plan with results"),
    ("manifest.json", lambda m: m["roles"][0].update(pieces=3), "no prefill-1/piece-0.pt2|made of|processor"),
    ("manifest.json", lambda m: m["roles"][0].pop("plan"), "a table with 'plan'"),
    ("manifest.json", lambda m: m["files"].update({"../evil.json": m["files"]["graph.json"]}), "should be plain names"),
    ("manifest.json", lambda m: m["files"]["graph.json"].update(bytes="1"), "should be a whole number"),
    ("manifest.json", lambda m: m["keys"]["passes"][0].update({"class": "os.system"}), "install the package"),
    ("manifest.json", lambda m: m["keys"]["passes"][0]["options"].update(x=1), "other options than it has here"),
    ("weights.json", lambda w: w.clear(), "a graph that reads known weights"),
    ("weights.json", lambda w: next(iter(w.values())).update(names=["no"]), "should be a weight of the model"),
    ("weights.json", lambda w: next(iter(w.values())).update(names=[]), "in the file of constants"),
    ("report.json", lambda r: r["listings"][0].append(10**9), "should be numbers of lines"),
    ("report.json", lambda r: r["lines"].append([1]), "six things"),
    ("report.json", lambda r: r["report"].update(model=3), "should be a text"),
]


@pytest.mark.parametrize(("name", "change", "complaint"), MANIFESTS)
def test_other_files_that_were_edited(saved: Path, name: str, change: Callable[[Any], None], complaint: str) -> None:
    edit(saved, name, change)
    with pytest.raises(ArtifactError, match=complaint):
        fxopt.load(saved, tiny("llama"), code="trusted")
    if "plain names" not in complaint and "whole number" not in complaint:
        with pytest.raises(ArtifactError, match=r"you did not save this folder|should be a table|'plan'"):
            fxopt.load(saved, tiny("llama"))


def test_memory_that_is_nobodys(saved: Path) -> None:
    def read_far_away(data: Any) -> None:
        call = {"call": "aten.as_strided.default", "args": [{"node": 0}, [100], [1]]}
        data["nodes"].append({"name": "far_away", **call})

    edit(saved, "decode-1/graph.json", read_far_away)
    with pytest.raises(ArtifactError, match="far_away reads memory by strides of its own"):
        fxopt.load(saved, tiny("llama"), code="again")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 10_000, "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "should be a table"),
        (b'{"sizes": {}, "nodes": ' + b"[" * 900 + b"]" * 900 + b"}", "should be a table"),
    ],
)
def test_json_that_is_meant_to_hurt(saved: Path, content: bytes, complaint: str) -> None:
    inside = inside_of(saved)
    manifest = json.loads((inside / "manifest.json").read_bytes())
    replace(inside, manifest, "graph.json", content)
    (inside / "manifest.json").write_bytes(json.dumps(manifest).encode())
    with pytest.raises(ArtifactError, match=complaint):
        fxopt.load(saved, tiny("llama"), code="trusted")


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("load must not unpickle")

    for owner, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(owner, name, refuse)
    fxopt.load(saved, tiny("llama"))


def test_a_load_that_fails_late_leaves_the_model_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxopt.loading.weights_from", interrupt)
    model = tiny("llama")
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        fxopt.load(saved, model)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]
