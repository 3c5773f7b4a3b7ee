"""Settings of an axis: they take turns in every round, or run one after the other where there is no room for all."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench_fakes import MACHINE, TINY, Fake, FakeMeter, Taking, measuring, without_what_takes_long
from torch import Tensor

from fxopt.bench.contender import Contender
from fxopt.bench.job import INTERRUPTED, Job, run
from fxopt.bench.measuring import Effort, Measuring
from fxopt.bench.results import Results
from fxopt.bench.series import Series
from fxopt.bench.setting import Setting
from fxopt.bench.source import Source
from fxopt.bench.stock import STOCK, DynamicCompiled, StaticCompiled
from fxopt.bench.subject import Subject
from fxopt.bench.trouble import OUT_OF_MEMORY
from fxopt.errors import InvalidRequestError

#: Each with a cache of its own; their batches tell them apart.
SIZES = [Setting(batch, 6, 4, 10 * batch) for batch in (1, 2, 3)]
AXIS = Series(SIZES, "max-len")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_what_takes_long(monkeypatch)


def fakes(names: Sequence[str], calls: list[tuple[str, int]], act: Callable[[str, int], Any] | None = None) -> Any:
    """A lineup that says who ran which batch, and does then what it is told."""

    def acting(name: str) -> Callable[[Tensor], None]:
        def noted(prompt: Tensor) -> None:
            calls.append((name, prompt.shape[0]))
            if act is not None:
                act(name, prompt.shape[0])

        return noted

    return [Fake(name, [], acting(name)) for name in names]


def outcome(found: Measuring) -> list[tuple[str, int, int, str | None]]:
    return [(row.contender, row.setting.batch, len(row.runs), row.trouble) for row in found.rows]


# --- turns ---------------------------------------------------------------------------------------


def test_settings_of_an_axis_take_turns() -> None:
    """One untimed round and all others: every contender in every setting."""
    calls: list[tuple[str, int]] = []
    found = measuring(fakes(["a", "b"], calls), rounds=3)
    found.run(AXIS)
    assert calls[-4 * 6 :] == [(name, batch) for batch in (1, 2, 3) for name in ("a", "b")] * 4
    assert outcome(found) == [(name, batch, 3, None) for batch in (1, 2, 3) for name in ("a", "b")]
    assert found.without_turns == {}


def test_settings_of_no_axis_take_none() -> None:
    calls: list[tuple[str, int]] = []
    measuring(fakes(["a"], calls), rounds=3).run(Series(SIZES))
    assert [batch for _, batch in calls] == sorted(batch for _, batch in calls)


def test_every_round_reads_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = itertools.count(1)
    monkeypatch.setattr("fxopt.bench.measuring.read_speed", lambda device: next(speeds) * 1e9)
    found = measuring(fakes(["a", "b"], []), rounds=3)
    found.run(AXIS)
    assert [[run.read_speed for run in row.runs] for row in found.rows] == [[1e9, 2e9, 3e9]] * 6
    assert Results.of(found, MACHINE).read_gb_s == 2


def test_settings_are_compared_with_the_first_of_their_axis() -> None:
    """Also where two axes share a setting, and where somebody has no part in the first one."""

    class Late(Fake):
        def why_not(self, subject: Subject, setting: Setting) -> str | None:
            return "it starts later" if setting.batch == 1 else None

    found = measuring([Fake("a", []), Late("late", [])])
    for series in (AXIS, Series(SIZES[1:], "batch"), Series(SIZES[:1])):
        found.run(series)
    told = {(one.axis, one.contender, one.setting.batch): one for one in Results.of(found, MACHINE).figures}
    assert len(told) == len(found.rows) == 10
    compared = {key for key, one in told.items() if one.step_to_first is not None}
    assert compared == {key for key in told if key[0] and key[:2] != ("max-len", "late")}
    firsts = [told["max-len", "a", 1], told["batch", "a", 2], told["batch", "late", 2]]
    assert [one.step_to_first for one in firsts] == [1.0] * 3


def test_models_of_several_depths_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While their axis is measured, and not longer."""
    load, depths = Source.load, (1, 3)
    loaded: list[tuple[int | None, weakref.ref[Any]]] = []

    def counting(self: Source, layers: int | None = None) -> Any:
        gc.collect()
        held = [depth for depth, model in loaded if model() is not None]
        assert held == ([1] if layers == 3 else [])
        model, tokenizer = load(self, layers)
        loaded.append((layers, weakref.ref(model)))
        return model, tokenizer

    class Deep(Fake):
        def generate(self, prompt: Tensor, new: int, stamp: Any) -> list[list[int]]:
            ran.append(self.layers)
            return super().generate(prompt, new, stamp)

        def prepare(self, subject: Subject) -> None:
            self.layers = subject.model.config.num_hidden_layers

    ran: list[int] = []
    monkeypatch.setattr(Source, "load", counting)
    found = measuring([], rounds=2)
    found._lineup = lambda: [Deep("a", [])]
    found.run(Series([Setting(1, 6, 2, 10, layers) for layers in depths], "depth"))
    assert ran[-4:] == [*depths] * 2
    found.run(AXIS)
    assert [depth for depth, _ in loaded] == [*depths, None]


def test_ctrl_c_in_the_second_round(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, int]] = []

    def act(name: str, batch: int) -> None:
        if calls.count((STOCK, 3)) == 5:  # warmed up, weighed, settled, and one round
            raise KeyboardInterrupt

    seen: list[Results] = []

    def shown(found: Results) -> str:
        seen.append(found)
        return ""

    job = Job(TINY, [AXIS], lambda: fakes([STOCK], calls, act), Effort(3), shown)
    assert run(job) == INTERRUPTED
    assert [(one.setting.batch, one.rounds) for one in seen[0].figures] == [(1, 2), (2, 2), (3, 1)]
    assert all(one.step_to_first is not None for one in seen[0].figures)
    assert "interrupted" in capsys.readouterr().err


# --- trouble -------------------------------------------------------------------------------------


def test_trouble_in_one_setting_is_a_row() -> None:
    """The others take their turns."""

    def act(name: str, batch: int) -> None:
        if (name, batch) == ("a", 2):
            raise ValueError("two are no number")

    found = measuring(fakes(["a", "b"], [], act))
    found.run(AXIS)
    said = "ValueError: two are no number"
    measured = [(name, batch, 2, None) for batch in (1, 2, 3) for name in ("a", "b")]
    assert outcome(found) == [*measured[:2], ("a", 2, 0, said), *measured[3:]]
    assert found.without_turns == {}


def test_trouble_in_one_round_ends_one_row() -> None:
    calls: list[tuple[str, int]] = []

    def act(name: str, batch: int) -> None:
        if batch == 2 and calls.count((name, batch)) == 5:
            raise MemoryError

    found = measuring(fakes(["a"], calls, act), rounds=3)
    found.run(AXIS)
    assert outcome(found) == [("a", 1, 3, None), ("a", 2, 1, OUT_OF_MEMORY), ("a", 3, 3, None)]


def test_the_first_setting_is_alone_when_it_gets_ready() -> None:
    """What has no room then has none at all."""

    def act(name: str, batch: int) -> None:
        if batch == 1:
            raise MemoryError

    found = measuring(fakes(["a"], [], act))
    found.run(AXIS)
    assert outcome(found) == [("a", 1, 0, OUT_OF_MEMORY), ("a", 2, 2, None), ("a", 3, 2, None)]
    assert found.without_turns == {}


def test_what_cannot_be_prepared_alone_is_not_crowded_out() -> None:
    class Unprepared(Fake):
        def prepare(self, subject: Subject) -> None:
            raise MemoryError

    found = measuring([Unprepared("a", []), *fakes(["b"], [])])
    found.run(Series([Setting(batch, 6, 4, 10) for batch in (1, 2)], "batch"))
    assert outcome(found) == [
        ("a", 1, 0, OUT_OF_MEMORY),
        ("b", 1, 2, None),
        ("a", 2, 0, OUT_OF_MEMORY),
        ("b", 2, 2, None),
    ]
    assert found.without_turns == {}


@pytest.mark.parametrize("fits_alone", [True, False])
@pytest.mark.parametrize("call", [1, 3], ids=["while it gets ready", "when all are there"])
def test_settings_that_do_not_fit_together(call: int, fits_alone: bool) -> None:
    """They run one after the other, and what does not fit alone either is a row."""
    calls: list[tuple[str, int]] = []

    def act(name: str, batch: int) -> None:
        if batch == 3 and (calls.count((name, 3)) == call or (not fits_alone and calls.count((name, 3)) > call)):
            raise MemoryError

    found = measuring(fakes(["a"], calls, act))
    found.run(AXIS)
    last = ("a", 3, 2, None) if fits_alone else ("a", 3, 0, OUT_OF_MEMORY)
    assert outcome(found) == [("a", 1, 2, None), ("a", 2, 2, None), last]
    assert found.without_turns == {"max-len": f"a, {SIZES[2]}: out of memory"}
    again = [batch for _, batch in calls[-8 - (4 if fits_alone else 1) :]]
    assert again == [1] * 4 + [2] * 4 + [3] * (4 if fits_alone else 1)


def test_models_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Source.load
    held: list[weakref.ref[Any]] = []

    def limited(self: Source, layers: int | None = None) -> Any:
        gc.collect()
        if any(one() is not None for one in held):
            raise InvalidRequestError("there is no room for two")
        model, tokenizer = load(self, layers)
        held.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(Source, "load", limited)
    found = measuring(fakes(["a"], []))
    found.run(Series([Setting(1, 6, 2, 10, layers) for layers in (1, 2)], "depth"))
    assert [len(row.runs) for row in found.rows] == [2, 2]
    assert found.without_turns == {"depth": "there is no room for two"}


# --- alone beside others -------------------------------------------------------------------------


@pytest.mark.parametrize("max_lens", [(40, 40), (20, 40)], ids=["one preparation", "two preparations"])
def test_peaks_are_those_of_settings_alone(max_lens: tuple[int, int]) -> None:
    """What is kept for the other setting is not counted."""
    meter = FakeMeter()

    def lineup() -> list[Contender]:
        return [
            Taking("a", meter, code=50_000, cache=700, run=90),
            Taking("b", meter, code=0, cache=20, run=3),
        ]

    found = measuring([])
    found._lineup, found.meter = lineup, meter
    found.run(Series([Setting(batch, 6, 4, max_len) for batch, max_len in zip((1, 2), max_lens, strict=True)], "x"))
    weights = sum(one.nbytes for one in (*TINY.load()[0].parameters(), *TINY.load()[0].buffers()))
    assert [row.peak_bytes for row in found.rows] == 2 * [weights + 50_790, weights + 23]


@pytest.mark.parametrize(("kind", "graphs"), [(StaticCompiled, 1), (DynamicCompiled, 2)])
def test_models_of_one_class_are_compiled_as_if_alone(kind: Any, graphs: int) -> None:
    """Dynamo would compile the second cache for any length and the third not at all."""
    compiled: list[list[torch.Size]] = []

    def backend(module: Any, inputs: Sequence[Any]) -> Any:
        compiled.append([one.shape for one in inputs if isinstance(one, Tensor)])
        return module.forward

    model, tokenizer = TINY.load()
    setting = Setting(1, 9, 4, 80)
    ready = []
    for max_len in (20, 40, 80):
        subject = Subject(TINY, model, tokenizer, max_len, 1)
        one = kind(backend)
        one.prepare(subject)
        before = len(compiled)
        one.generate(subject.prompt(setting), 4, None)
        assert len(compiled) - before == graphs
        ready.append((one, subject))
    if kind is StaticCompiled:
        assert all(isinstance(size, int) for shapes in compiled for shape in shapes for size in shape)
    for one, subject in ready:
        one.generate(subject.prompt(setting), 4, None)
    assert len(compiled) == 3 * graphs, "all stay, and run in turns"
