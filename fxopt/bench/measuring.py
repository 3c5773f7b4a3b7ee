"""All contenders of a setting in turns, one round after the other."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from fxopt.bench.answers import hashed
from fxopt.bench.bandwidth import read_speed
from fxopt.bench.contender import Contender
from fxopt.bench.field import Field
from fxopt.bench.memory import Meter, meter_for, tidy
from fxopt.bench.row import Row
from fxopt.bench.setting import Setting
from fxopt.bench.source import Source
from fxopt.bench.subject import Subject
from fxopt.bench.timing import timed
from fxopt.bench.traces import Traces
from fxopt.bench.trouble import noted
from fxopt.progress import Progress


@dataclass(frozen=True)
class Effort:
    """How often everything is done."""

    rounds: int = 3
    warmups: int = 1


class Measuring:
    """Fills ``rows``; what is there can be shown at any time, also after Ctrl-C."""

    def __init__(
        self,
        source: Source,
        lineup: Callable[[], Sequence[Contender]],
        effort: Effort,
        progress: Progress,
        traces: Traces | None = None,
    ) -> None:
        self.source = source
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}  # who did not take part, and why
        self.read_speeds: list[float] = []  # bytes per second, once a round
        self.meter: Meter | None = meter_for(source.device)
        self._lineup = lineup
        self._effort = effort
        self._progress = progress
        self._traces = traces
        self._loaded: tuple[int | None, tuple[Any, Any]] | None = None

    def run(self, settings: Sequence[Setting]) -> None:
        """Measure in order; settings with one depth and one ``max_len`` share what is prepared."""
        for (layers, max_len), together in _groups(settings).items():
            self._run_together(layers, max_len, together)

    def _run_together(self, layers: int | None, max_len: int, settings: Sequence[Setting]) -> None:
        model, tokenizer = self._model(layers)
        subject = Subject(self.source, model, tokenizer, max_len, max(setting.batch for setting in settings))
        field = Field(self._lineup(), subject, self.meter, self._progress)
        with new_compilers():
            for setting in settings:
                self._measure(field, setting)

    def _model(self, layers: int | None) -> tuple[Any, Any]:
        if self._loaded is None or self._loaded[0] != layers:
            self._loaded = None  # there need not be room for two
            tidy()
            with self._progress.step(f"load {self.source}"):
                self._loaded = layers, self.source.load(layers)
        return self._loaded[1]

    def _measure(self, field: Field, setting: Setting) -> None:
        prompt = field.subject.prompt(setting)
        # A step attends to the prompt and, on average, to half of what is new.
        step_bytes = field.subject.traffic.step(setting.batch, setting.prompt + setting.new / 2)
        racing: list[tuple[Contender, Row]] = []
        for contender in field.contenders:
            if (reason := contender.why_not(field.subject, setting)) is not None:
                self.left_out[contender.name] = reason
                continue
            racing.append((contender, Row(contender.name, setting, contender.is_ours, step_bytes)))
        self.rows += [row for _, row in racing]
        # The last first: of ours, those with more passes seat weights anew, and the others have to find them there.
        for contender, row in reversed(racing):
            field.prepare(contender, row)
        for contender, row in racing:
            if row.trouble is None:
                with noted(row):
                    self._warm_up(field, contender, row, prompt)
        for turn in range(self._effort.rounds):
            with self._progress.step(f"{setting}: round {turn + 1} of {self._effort.rounds}"):
                self._round(racing, prompt)
        self._trace(racing, prompt)

    def _warm_up(self, field: Field, contender: Contender, row: Row, prompt: Tensor) -> None:
        """Until everything is compiled; then once more, to see how much memory it takes and what it says."""
        for turn in range(self._effort.warmups):
            began = time.perf_counter()
            with self._progress.step(f"{row.setting}: warm up {row.contender}"), field.keeping(contender):
                contender.generate(prompt, row.setting.new, None)
            if turn == 0:
                row.ready_s += time.perf_counter() - began
        with self._progress.step(f"{row.setting}: weigh {row.contender}"):
            row.tokens, row.peak_bytes = field.weighed(contender, prompt, row.setting.new)
        row.text_hash = hashed(field.subject.texts(prompt, row.tokens))

    def _round(self, racing: Sequence[tuple[Contender, Row]], prompt: Tensor) -> None:
        if (speed := read_speed(self.source.device)) is not None:
            self.read_speeds.append(speed)
        for contender, row in racing:
            if row.trouble is None:
                with noted(row):
                    row.runs.append(timed(contender, prompt, row.setting.new))

    def _trace(self, racing: Sequence[tuple[Contender, Row]], prompt: Tensor) -> None:
        for contender, row in racing:
            if self._traces is not None and row.trouble is None:
                with noted(row), self._progress.step(f"profile {row.contender}"):
                    self._traces.record(contender, prompt, row.setting)


@contextlib.contextmanager
def new_compilers() -> Iterator[None]:
    """Nothing was compiled before, in this process or in an earlier one."""
    torch._dynamo.reset()  # which would otherwise fall back to eager code after some models of one class
    with tempfile.TemporaryDirectory(prefix="fxopt_bench_") as folder, fresh_cache(dir=folder):
        yield


def _groups(settings: Sequence[Setting]) -> dict[tuple[int | None, int], list[Setting]]:
    found = defaultdict(list)
    for setting in settings:
        found[setting.layers, setting.max_len].append(setting)
    return dict(found)
