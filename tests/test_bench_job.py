"""A whole job of ``fxopt bench``: how it ends, what is shown and kept, and what its exit code says."""

from __future__ import annotations

import csv
import gc
import io
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import TINY, Fake, without_what_takes_long
from torch import Tensor

from fxopt.bench.contender import Contender
from fxopt.bench.job import INTERRUPTED, WRONG, Job, run
from fxopt.bench.measuring import Effort, Measuring
from fxopt.bench.pictures import drawing
from fxopt.bench.series import Series
from fxopt.bench.setting import Setting, settings
from fxopt.bench.source import Source
from fxopt.bench.stock import STOCK
from fxopt.bench.subject import Subject
from fxopt.errors import InvalidRequestError
from fxopt.progress import Progress

SMALL = settings([1], [6], [4])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_what_takes_long(monkeypatch)


def job(*contenders: Contender, sizes: list[Setting] = SMALL, **others: Any) -> Job:
    return Job(TINY, [Series(sizes)], lambda: contenders, Effort(rounds=2), **others)


def test_ctrl_c_shows_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second round of the larger batch."""
    calls: list[str] = []

    def act(prompt: Tensor) -> None:
        if calls.count("b") == 8:
            raise KeyboardInterrupt

    path = tmp_path / "bench.csv"
    sizes = settings([1, 2], [6], [4])
    assert run(job(Fake(STOCK, calls), Fake("b", calls, act), sizes=sizes, csv=path)) == INTERRUPTED
    printed = capsys.readouterr()
    assert "batch 1, prompt 6" in printed.out
    assert "batch 2, prompt 6" in printed.out
    assert "interrupted" in printed.err
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["contender"], line["batch"], line["rounds"]) for line in lines] == [
        (STOCK, "1", "2"),
        ("b", "1", "2"),
        (STOCK, "2", "2"),
        ("b", "2", "1"),
    ]
    assert all(float(line["tok_per_s"]) > 0 for line in lines)


def test_a_time_limit_is_as_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    before = signal.getsignal(signal.SIGTERM)

    def act(prompt: Tensor) -> None:
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 0.2)  # until it has arrived

    assert run(job(Fake(STOCK, calls, act))) == INTERRUPTED
    assert "interrupted; this is what was measured until then" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_before_anything_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def act(prompt: Tensor) -> None:
        raise KeyboardInterrupt

    assert run(job(Fake(STOCK, [], act), csv=tmp_path / "bench.csv")) == INTERRUPTED
    assert f"{STOCK}, batch 1, prompt 6, 4 new tokens, max_len 10: not measured" in capsys.readouterr().out


def test_a_model_that_cannot_be_loaded_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured of those before is shown; if there is nothing, the sentence is all."""
    load = Source.load

    def limited(self: Source, layers: int | None = None) -> Any:
        if layers == 9:
            raise InvalidRequestError("there is no room for 9 layers")
        return load(self, layers)

    monkeypatch.setattr(Source, "load", limited)
    sizes = [Setting(1, 6, 4, 10, layers) for layers in (1, 9)]
    assert run(job(Fake(STOCK, []), sizes=sizes)) == WRONG
    printed = capsys.readouterr()
    assert "1 layers, batch 1, prompt 6" in printed.out
    assert printed.err == "fxopt: there is no room for 9 layers; this is what was measured until then\n"
    with pytest.raises(InvalidRequestError, match="no room"):
        run(job(Fake(STOCK, []), sizes=sizes[1:]))


def test_two_models_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Source.load
    seen: list[weakref.ref[Any]] = []

    def counting(self: Source, layers: int | None = None) -> Any:
        gc.collect()
        assert [one() for one in seen if one() is not None] == []
        model, tokenizer = load(self, layers)
        seen.append(weakref.ref(model))
        return model, tokenizer

    class Holding(Fake):
        def prepare(self, subject: Subject) -> None:
            self.model = subject.model

    monkeypatch.setattr(Source, "load", counting)
    found = Measuring(TINY, lambda: [Holding("a", [])], Effort(1), Progress(io.StringIO()))
    found.run(Series([Setting(1, 6, 4, 10, layers) for layers in (1, 2, 3)]))
    assert len(seen) == 3


def test_ctrl_c_in_the_first_setting_of_a_sweep(tmp_path: Path) -> None:
    """What there is of it is drawn."""
    calls: list[str] = []

    def act(prompt: Tensor) -> None:
        if len(calls) == 5:
            raise KeyboardInterrupt

    sizes = settings([1, 2], [6], [4])
    picture = tmp_path / "bench.svg"
    assert run(job(Fake(STOCK, calls, act), sizes=sizes, svg=picture, drawn=drawing(sizes))) == INTERRUPTED
    assert picture.read_text().count('<circle class="dot') >= 3


class FakeOurs(Fake):
    is_ours = True


@pytest.mark.parametrize(("answer", "code"), [(7, 0), (8, WRONG)])
def test_other_tokens_are_an_error(answer: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(job(Fake(STOCK, []), FakeOurs("fxopt", [], answer=answer))) == code
    said = "fxopt, batch 1, prompt 6, 4 new tokens, max_len 10: its tokens are those of the stock model for the first 0"
    assert (said in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"csv": Path("nowhere/bench.csv")}, "there is no folder nowhere"),
        ({"svg": Path("nowhere/bench.svg"), "drawn": lambda results: []}, "there is no folder nowhere"),
        ({"svg": Path("bench.svg")}, "give several sizes of a kind"),
        ({"sizes": settings([1], [6], [4], 5000)}, "max_len 5000 was asked for, and tiny has 4096 positions"),
    ],
)
def test_what_cannot_be_kept_is_not_measured(others: dict[str, Any], words: str) -> None:
    calls: list[str] = []
    with pytest.raises(InvalidRequestError, match=words):
        run(job(Fake("a", calls), **others))
    assert calls == []
