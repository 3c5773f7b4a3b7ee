"""Contenders that do no work, and results that nobody measured."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.bench.contender import Contender, Stamp, Tokens
from fxopt.bench.figures import Figures
from fxopt.bench.machine import Machine
from fxopt.bench.measuring import Effort, Measuring
from fxopt.bench.memory import Meter
from fxopt.bench.results import Results
from fxopt.bench.setting import Setting
from fxopt.bench.source import Source
from fxopt.bench.subject import Subject
from fxopt.progress import Progress

TINY = Source("tiny", True, torch.float32, torch.device("cpu"))
MACHINE = Machine(
    "some processor",
    cores=2,
    threads=1,
    load=0.1,
    versions={"torch": "2.13.0", "transformers": "5.23.0", "fxopt": "0.1.0", "python": "3.11"},
    commit="abc1234",
    date="2026-11-21",
)


class Fake(Contender):
    """Says that it was called, does what it is told, and answers 7 7 7."""

    def __init__(
        self, name: str, calls: list[str], act: Callable[[Tensor], Any] | None = None, answer: int = 7
    ) -> None:
        self.name = name
        self._calls = calls
        self._act = act
        self._answer = answer

    def prepare(self, subject: Subject) -> None:
        self._calls.append(f"prepare {self.name}")

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        self._calls.append(self.name)
        if self._act is not None:
            self._act(prompt)
        for _ in range(new if stamp is not None else 0):
            assert stamp is not None
            stamp()
        return [[self._answer] * new] * prompt.shape[0]


class FakeMeter(Meter):
    """Memory that contenders say they take."""

    what = "a number"

    def __init__(self) -> None:
        self.held = self.most = 1000

    def take(self, nbytes: int) -> None:
        self.held += nbytes
        self.most = max(self.most, self.held)

    def now(self) -> int:
        return self.held

    def restart(self) -> None:
        self.most = self.held

    def peak(self) -> int:
        return self.most


class Taking(Fake):
    """Keeps ``code`` from the preparation on and a cache between calls, and takes ``run`` while it runs."""

    def __init__(self, name: str, meter: FakeMeter, *, code: int, cache: int, run: int, shares: bool = True) -> None:
        super().__init__(name, [])
        self.shares_weights = shares
        self._meter, self._code, self._cache, self._run = meter, code, cache, run
        self._cached = False

    def prepare(self, subject: Subject) -> None:
        self._meter.take(10 * self._code)  # while it compiles
        self._meter.take(-9 * self._code)

    def generate(self, prompt: Tensor, new: int, stamp: Any) -> list[list[int]]:
        if not self._cached:
            self._cached = True
            self._meter.take(self._cache)
        self._meter.take(self._run)
        self._meter.take(-self._run)
        return super().generate(prompt, new, stamp)

    def release(self) -> None:
        if self._cached:
            self._cached = False
            self._meter.take(-self._cache)


def measuring(contenders: Sequence[Contender], rounds: int = 2) -> Measuring:
    return Measuring(TINY, lambda: contenders, Effort(rounds), Progress(io.StringIO()))


def results(*figures: Figures, dtype: str = "float32") -> Results:
    return Results("tiny", dtype, MACHINE, figures, {}, 20.0, "resident memory of the process")


def figure(contender: str = "fxopt", setting: Setting | None = None, **others: Any) -> Figures:
    return Figures(contender, setting or Setting(1, 20, 8, 28), contender.startswith("fxopt"), 3, 1.0, **others)


def without_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not read for its speed nor tidied up, and compilers keep their caches."""
    for place in ("field", "models", "trouble"):
        monkeypatch.setattr(f"fxopt.bench.{place}.tidy", lambda: None)
    monkeypatch.setattr("fxopt.bench.measuring.read_speed", lambda device: 2e10)
    monkeypatch.setattr("fxopt.bench.measuring.new_compilers", contextlib.nullcontext)
