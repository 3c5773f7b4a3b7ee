"""The catalogue: what may be registered, in which order passes stand, and what packages bring along."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fxopt
from fxopt import registry
from fxopt.admission import select
from fxopt.errors import FxoptError, InvalidRequestError
from fxopt.families import tiny
from fxopt.passes import PASSES
from fxopt.passes.fuse_qkv import FuseQKV
from fxopt.program import Program
from fxopt.registry import catalogue, register, unregister
from fxopt.rewrite import Located, Pass, Stage
from fxopt.views import Linear

BUILT_IN = [kind.name for kind in PASSES]
SYMBOLIC = [kind.name for kind in PASSES if kind.stage is Stage.SYMBOLIC]
DECODE = [kind.name for kind in PASSES if kind.stage is Stage.DECODE]
CODE = [kind.name for kind in PASSES if kind.stage is Stage.CODE]


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing registered, and no package looked at yet."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_installed", None)


@dataclass(frozen=True)
class Idle(Pass[Located]):
    name = "idle"
    summary = "does nothing"

    def find(self, program: Program) -> Iterator[Located]:
        yield from ()


def made(name: str, after: Any = None, stage: Any = Stage.SYMBOLIC) -> type[Idle]:
    """A class of passes of this name, at a path of its own."""
    kind = type(name.title(), (Idle,), {"name": name, "after": after, "stage": stage, "__module__": __name__})
    return dataclass(frozen=True)(kind)


def names() -> list[str]:
    return [kind.name for kind in catalogue()]


def assert_sentence(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    assert isinstance(error.value, FxoptError)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


# --- order ---------------------------------------------------------------------------------------


def test_without_any_other_it_is_the_built_in_order() -> None:
    assert catalogue() == PASSES


def test_a_pass_goes_behind_all_of_its_stage() -> None:
    assert register(Idle) is Idle
    register(made("late", stage=Stage.DECODE))
    assert names() == [*SYMBOLIC, "idle", *DECODE, "late", *CODE]


def test_a_pass_goes_right_behind_the_one_it_names() -> None:
    for kind in (
        made("second", after="first"),  # registered before what it goes behind
        made("first", after="fuse_qkv"),
        made("other", after="fuse_qkv"),
        made("single", after="decode_attention", stage=Stage.DECODE),
    ):
        register(kind)
    at = BUILT_IN.index("fuse_qkv") + 1
    wanted = [*BUILT_IN[:at], "first", "second", "other", *BUILT_IN[at:]]
    wanted.insert(wanted.index("decode_attention") + 1, "single")
    assert names() == wanted


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ([made("mine", "fuse_qvk")], ["mine is to go behind 'fuse_qvk'", "no such pass; did you mean fuse_qkv?"]),
        ([made("mine", "zzz")], ["mine is to go behind 'zzz'", "no such pass; register it"]),
        ([made("mine", "mine")], ["in a circle: mine behind mine;"]),
        ([made("one", "two"), made("two", "one")], ["in a circle: one behind two, two behind one;"]),
        ([made("mine", "matvec")], ["mine is to go behind matvec", "the symbolic graph", "the decode one"]),
        ([made("mine", "rotary", Stage.DECODE)], ["mine is to go behind rotary", "the decode graph"]),
    ],
)
def test_orders_that_cannot_be(kinds: list[type[Idle]], words: list[str]) -> None:
    for kind in kinds:
        register(kind)
    with pytest.raises(InvalidRequestError) as raised:
        select(None)
    assert_sentence(raised, *words)
    for kind in kinds:
        unregister(kind.name)
    assert names() == BUILT_IN


def test_objects_that_are_in_no_catalogue_have_their_place_too() -> None:
    """By their own word, whatever the order they are given in."""
    given: list[Any] = [made("tail")(), "matvec", made("behind", "rotary")(), *PASSES]
    selected = [rewriter.name for rewriter in select(given)]
    at = SYMBOLIC.index("rotary") + 1
    assert selected == [*SYMBOLIC[:at], "behind", *SYMBOLIC[at:], "tail", *DECODE, *CODE]


# --- what may be registered ----------------------------------------------------------------------


@dataclass(frozen=True)
class NeedsMore(Idle):
    amount: int


class NoDataclass(Pass[Located]):
    name = "no_dataclass"
    summary = "is a plain class"


class NoName(Pass[Located]):
    summary = "has no name"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (7, ["7 is no subclass of fxopt.Pass"]),
        (Idle(), ["is no subclass of fxopt.Pass"]),
        (torch.nn.Linear, ["is no subclass of fxopt.Pass"]),
        (NoName, ["NoName has name=None, which is no identifier"]),
        (made("two words"), ["name='two words', which is no identifier"]),
        (made("capture"), ["name='capture', which stands for something else in the report"]),
        (type("NoSummary", (Idle,), {"summary": ""}), ["NoSummary has summary=''"]),
        (made("mine", stage="decode"), ["has stage='decode', which is none of fxopt.Stage"]),
        (made("mine", stage=Stage.CODE), ["that tell the compiler what to do are fxopt's own"]),
        (type("Often", (Idle,), {"by_default": "often"}), ["has by_default='often', where True or False is needed"]),
        (made("mine", after=FuseQKV), ["where the name of a pass is needed"]),
        (NoDataclass, ["NoDataclass is no dataclass", "below @register"]),
        (NeedsMore, ["NeedsMore cannot be made without arguments", "'amount'"]),
        (made("fuse_qkv"), ["Fuse_Qkv is named 'fuse_qkv', and so is fxopt.passes.fuse_qkv.FuseQKV"]),
    ],
    ids=str,
)
def test_what_cannot_be_registered(kind: Any, words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        register(kind)
    assert_sentence(raised, *words)
    assert names() == BUILT_IN


def test_two_classes_of_one_name() -> None:
    register(Idle)
    with pytest.raises(InvalidRequestError) as raised:
        register(type("Other", (Idle,), {"__module__": "elsewhere"}))
    assert_sentence(raised, "elsewhere.Other is named 'idle'", "test_registry.Idle", "a name of its own")
    assert catalogue()[len(SYMBOLIC)] is Idle


def test_the_same_class_again_is_harmless() -> None:
    for _ in range(2):
        register(Idle)
    register(FuseQKV)
    assert names() == [*SYMBOLIC, "idle", *DECODE, *CODE]


def test_a_class_defined_again_replaces_the_former_in_its_place() -> None:
    """As when a notebook's cell is run again, also with a new name in it."""
    register(made("mine"))
    register(made("other"))
    for name in ("mine", "renamed"):
        again = made("mine")
        again.name = name
        register(again)
        assert [kind for kind in catalogue() if kind.name == name] == [again]
        assert names() == [*SYMBOLIC, name, "other", *DECODE, *CODE]


def test_classes_that_one_function_makes_are_not_taken_for_each_other() -> None:
    def variant(label: str) -> type[Idle]:
        @dataclass(frozen=True)
        class Variant(Idle):
            name = label

        return Variant

    for label in ("one", "two", "one"):
        register(variant(label))
    assert names() == [*SYMBOLIC, "one", "two", *DECODE, *CODE]


def test_unregister() -> None:
    register(Idle)
    unregister("idle")
    assert names() == BUILT_IN
    for name, words in {
        "idle": ["no pass named 'idle' was registered", "passes={'idle': False}"],
        "fuse_qkv": ["no pass named 'fuse_qkv' was registered", "passes={'fuse_qkv': False}"],
    }.items():
        with pytest.raises(InvalidRequestError) as raised:
            unregister(name)
        assert_sentence(raised, *words)


# --- installed packages --------------------------------------------------------------------------

PACKAGE = """
from dataclasses import dataclass
import fxopt

@dataclass(frozen=True)
class Brought(fxopt.Pass):
    name = {name!r}
    summary = "comes with a package"
    after = {after!r}

    def find(self, program):
        yield from ()
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package on the path, with what pip would write beside it."""

    def put(module: str, source: str, value: str = "Brought", folder: Path | None = None) -> None:
        home = folder or tmp_path / module
        info = home / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (home / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fxopt.passes]\n{module} = {module}:{value}\n")
        if folder is None:
            monkeypatch.syspath_prepend(str(home))

    return put


def package(name: str, after: str | None = None) -> str:
    return PACKAGE.format(name=name, after=after)


def test_passes_of_packages_stand_in_the_catalogue(install: Install) -> None:
    """One may go behind what comes later in the alphabet, from another package."""
    install("brought_a", package("early", after="late"))
    install("brought_b", package("late", after="static_kv"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at = BUILT_IN.index("static_kv") + 1
        assert names() == [*BUILT_IN[:at], "late", "early", *BUILT_IN[at:]]
    assert [rewriter.name for rewriter in select({"late": False})].count("early") == 1


@pytest.mark.parametrize(
    ("module", "source", "value", "words"),
    [
        ("bad_import", "import no_such_module", "Brought", ["fails to load, ModuleNotFoundError", "no_such_module"]),
        ("bad_attribute", "", "Brought", ["fails to load, AttributeError"]),
        ("bad_exit", "raise RuntimeError('not here')", "Brought", ["RuntimeError: not here"]),
        ("bad_kind", "Brought = 7", "Brought", ["7 is no subclass of fxopt.Pass"]),
        ("bad_name", package("rotary"), "Brought", ["fxopt.passes.rotary.Rotary is named 'rotary' too"]),
        ("bad_after", package("brought", after="rotery"), "Brought", ["did you mean rotary?"]),
        ("bad_circle", package("brought", after="brought"), "Brought", ["in a circle"]),
    ],
)
def test_a_package_that_does_not_fit_is_a_warning(
    install: Install, module: str, source: str, value: str, words: list[str]
) -> None:
    install(module, source, value)
    install(f"good_beside_{module}", package("good"))
    with pytest.warns(UserWarning, match="goes on without it") as caught:
        assert names() == [*SYMBOLIC, "good", *DECODE, *CODE]
    (said,) = [str(warning.message) for warning in caught]
    for word in [module.replace("_", "-"), f"{module}:{value}", *words]:
        assert word in said
    assert "\n" not in said


@pytest.mark.filterwarnings("error::UserWarning")
def test_where_warnings_are_errors_the_other_packages_still_come(install: Install) -> None:
    install("bad_package", "Brought = 7")
    install("good_package", package("good"))
    with pytest.raises(UserWarning, match="bad-package"):
        catalogue()
    assert names() == [*SYMBOLIC, "good", *DECODE, *CODE]


def test_a_name_that_is_registered_already(install: Install) -> None:
    register(Idle)
    install("late_comer", package("idle"))
    with pytest.warns(UserWarning, match="late-comer .*test_registry.Idle is named 'idle' too"):
        assert Idle in catalogue()


def test_a_name_that_a_package_has(install: Install) -> None:
    install("first_comer", package("idle"))
    catalogue()
    with pytest.raises(InvalidRequestError) as raised:
        register(Idle)
    assert_sentence(raised, "Idle is named 'idle', and so is first_comer.Brought")


def test_a_package_that_also_registers_and_asks_for_the_catalogue(install: Install) -> None:
    head = "from fxopt.registry import catalogue, register\nassert len(catalogue()) > 9\n"
    install("eager_package", head + package("brought") + "\nregister(Brought)\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names() == [*SYMBOLIC, "brought", *DECODE, *CODE]


def test_packages_are_loaded_once_and_not_before_they_are_asked_for(install: Install, tmp_path: Path) -> None:
    """Also when several threads ask at the same time: all of them wait for the same."""
    log = tmp_path / "log"
    head = f"import time\nopen({str(log)!r}, 'a').write('loaded ')\ntime.sleep(0.2)\n"
    install("slow_package", head + package("brought"))
    register(Idle)
    unregister("idle")
    assert not log.exists()
    start = threading.Barrier(4)

    def ask() -> list[str]:
        start.wait()
        return names()

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(ask) for _ in range(4)]]
    assert found == [[*SYMBOLIC, "brought", *DECODE, *CODE]] * 4
    assert log.read_text() == "loaded "


def test_nothing_is_loaded_from_a_folder_of_a_model(install: Install, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama", num_hidden_layers=1).save_pretrained(folder)
    install("from_a_model", "raise SystemExit('code of a model has run')", folder=folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    fast = fxopt.optimize(model, 32, backend="eager", passes="minimal", verify="off")
    assert [stage.name for stage in fast.fxopt.report.passes] == ["remove_control_flow", "static_kv"]


# --- what registering is for ---------------------------------------------------------------------


@dataclass(frozen=True)
class Recompute(Pass[Linear]):
    """Adds zero to what each linear gives."""

    name = "recompute"
    summary = "adds a number"
    after = "last_logits"
    number: float = 0.0

    def find(self, program: Program) -> Iterator[Linear]:
        yield from Linear.all(program)

    def rewrite(self, program: Program, site: Linear) -> None:
        users = list(site.node.users)
        with program.graph.inserting_after(site.node):
            added = program.graph.call_function(torch.ops.aten.add.Tensor, (site.node, self.number))
        for user in users:
            user.replace_input_with(site.node, added)


def test_optimize_applies_and_reports_what_is_registered() -> None:
    register(Recompute)
    model = tiny("llama", num_hidden_layers=1)
    report = fxopt.optimize(model, 32, backend="eager", verify="each").fxopt.report
    assert report["recompute"].matched > 0
    assert report["recompute"].verified is not None
    assert "recompute" in str(report)
    assert "add(" in report.diff("recompute")
    assert [stage.name for stage in report.passes] == [one.name for one in select(None)]


def test_a_registered_pass_can_be_left_out_or_given_options() -> None:
    register(Recompute)
    assert "recompute" not in [rewriter.name for rewriter in select({"recompute": False})]
    assert "recompute" not in [rewriter.name for rewriter in select("minimal")]
    assert Recompute(2.0) in select({"recompute": {"number": 2.0}})
    assert Recompute() in select(["recompute"])
    unregister("recompute")
    assert Recompute() not in select(None)


def test_verification_protects_from_a_registered_pass() -> None:
    @dataclass(frozen=True)
    class Wrong(Recompute):
        number: float = 1.0

    register(Wrong)
    model = tiny("llama", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="with recompute applied"):
        fast = fxopt.optimize(model, 32, backend="eager")
    assert fast.fxopt.report["recompute"].dropped
    tokens = torch.full((1, 4), 5)
    assert torch.allclose(fast(tokens).logits, model(tokens).logits, atol=1e-4)
