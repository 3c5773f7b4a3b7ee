"""All contenders in turns, one round after the other; along an axis its settings take turns as well."""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._inductor.utils import fresh_cache

from fxopt.bench.bandwidth import read_speed
from fxopt.bench.contender import Contender
from fxopt.bench.entry import Entry
from fxopt.bench.field import Field
from fxopt.bench.memory import Meter, meter_for
from fxopt.bench.models import Models
from fxopt.bench.row import Row
from fxopt.bench.series import Series
from fxopt.bench.setting import Setting
from fxopt.bench.source import Source
from fxopt.bench.subject import Subject
from fxopt.bench.traces import Traces
from fxopt.bench.trouble import OUT_OF_MEMORY
from fxopt.errors import FxoptError
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
        self.without_turns: dict[str, str] = {}  # axes whose settings do not fit into memory at once, and what said so
        self.meter: Meter | None = meter_for(source.device)
        self._lineup = lineup
        self._effort = effort
        self._progress = progress
        self._traces = traces
        self._models = Models(source, progress)

    def run(self, series: Series) -> None:
        if not series.takes_turns or not self._fit_and_run(series):
            self._run_one_by_one(series)

    def _fit_and_run(self, series: Series) -> bool:
        """Whether all settings were there at once, and have taken turns."""
        before = len(self.rows)
        reason = self._run_in_turns(series)
        if reason is not None:
            del self.rows[before:]
            self.without_turns[series.axis] = reason
        return reason is None

    def _run_in_turns(self, series: Series) -> str | None:
        """None, or what found no room beside the others; alone it might."""
        self._forget_others(series.settings)
        entries: list[Entry] = []
        with contextlib.ExitStack() as compilers:
            reason = self._make_ready(series, entries, compilers) or _settled(entries)
            if reason is None:
                self._run_rounds(series.axis, entries)
        return reason

    def _make_ready(self, series: Series, entries: list[Entry], compilers: contextlib.ExitStack) -> str | None:
        """Fill ``entries``, until one finds no room beside those that are there."""
        for place, settings in enumerate(_sharing(series.settings)):
            try:
                field = self._field(settings)
            except FxoptError as error:
                if place == 0:
                    raise
                return str(error)
            compilers.enter_context(new_compilers())
            for setting in settings:
                added = self._ready(series, field, setting)
                if entries and (reason := _crowded_out(added, entries)) is not None:
                    return reason
                entries += added
        return None

    def _run_one_by_one(self, series: Series) -> None:
        """What settings can share is prepared once."""
        for settings in _sharing(series.settings):
            self._forget_others(settings)
            self._run_sharing(series, settings)

    def _run_sharing(self, series: Series, settings: Sequence[Setting]) -> None:
        field = self._field(settings)
        with new_compilers():
            for setting in settings:
                self._run_rounds(str(setting), self._ready(series, field, setting))

    def _forget_others(self, settings: Sequence[Setting]) -> None:
        """Give back what was compiled and loaded for settings before these."""
        torch._dynamo.reset()
        self._models.keep({setting.layers for setting in settings})

    def _field(self, settings: Sequence[Setting]) -> Field:
        """Contenders for settings with one depth and one ``max_len``."""
        model, tokenizer = self._models.of(settings[0].layers)
        largest = max(setting.batch for setting in settings)
        subject = Subject(self.source, model, tokenizer, settings[0].max_len, largest)
        return Field(self._lineup(), subject, self.meter, self._progress)

    def _ready(self, series: Series, field: Field, setting: Setting) -> list[Entry]:
        """Those who take part in a setting, prepared and warmed up."""
        prompt = field.subject.prompt(setting)
        # A step attends to the prompt and, on average, to half of what is new.
        step_bytes = field.subject.traffic.step(setting.batch, setting.prompt + setting.new / 2)
        entries = []
        for contender in field.contenders:
            if (reason := contender.why_not(field.subject, setting)) is not None:
                self.left_out[contender.name] = reason
                continue
            row = Row(contender.name, setting, series.axis, contender.is_ours, step_bytes)
            entries.append(Entry(field, contender, prompt, row, self._progress))
        self.rows += [entry.row for entry in entries]
        # The last first: of ours, those with more passes seat weights anew, and the others have to find them there.
        for entry in reversed(entries):
            entry.prepare()
        for entry in entries:
            entry.warm_up(self._effort.warmups)
        return entries

    def _run_rounds(self, what: str, entries: Sequence[Entry]) -> None:
        for turn in range(self._effort.rounds):
            with self._progress.step(f"{what}: round {turn + 1} of {self._effort.rounds}"):
                speed = read_speed(self.source.device)
                for entry in entries:
                    entry.run(speed)
        if self._traces is not None:
            for entry in entries:
                entry.trace(self._traces)


@contextlib.contextmanager
def new_compilers() -> Iterator[None]:
    """Nothing was compiled before, in this process or in an earlier one; what was, goes on running."""
    with tempfile.TemporaryDirectory(prefix="fxopt_bench_") as folder, fresh_cache(dir=folder):
        yield


def _sharing(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings in groups that one model and one cache serve."""
    found = defaultdict(list)
    for setting in settings:
        found[setting.layers, setting.max_len].append(setting)
    return list(found.values())


def _settled(entries: Sequence[Entry]) -> str | None:
    """Weighing one setting took from the others what they had kept; only after this everything is there at once."""
    ready = [entry for entry in entries if entry.row.trouble is None]
    for entry in ready:
        entry.settle()
    return _crowded_out(ready)


def _crowded_out(entries: Sequence[Entry], before: Sequence[Entry] = ()) -> str | None:
    """The first that ran out of memory, except those that did so alone, in a setting before: sizes grow."""
    hopeless = {entry.row.contender for entry in before if entry.row.trouble == OUT_OF_MEMORY}
    for row in (entry.row for entry in entries):
        if row.trouble == OUT_OF_MEMORY and row.contender not in hopeless:
            return f"{row.contender}, {row.setting}: {OUT_OF_MEMORY}"
    return None
