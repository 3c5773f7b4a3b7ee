"""A benchmark from beginning to end: check, measure, show, write; whatever happens, what was measured is shown."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxopt.bench import records
from fxopt.bench.chart import Panel, draw
from fxopt.bench.contender import Contender
from fxopt.bench.machine import Machine
from fxopt.bench.measuring import Effort, Measuring
from fxopt.bench.pictures import title
from fxopt.bench.results import Results
from fxopt.bench.series import Series
from fxopt.bench.source import Source
from fxopt.bench.table import compared
from fxopt.bench.traces import Traces
from fxopt.errors import FxoptError, InvalidRequestError
from fxopt.progress import Progress

WRONG, INTERRUPTED = 1, 130  # exit codes


@dataclass(frozen=True)
class Job:
    """What is measured, how it is shown, and where it is written."""

    source: Source
    series: Sequence[Series]
    lineup: Callable[[], Sequence[Contender]]
    effort: Effort
    shown: Callable[[Results], str] = compared
    drawn: Callable[[Results], Sequence[Panel]] | None = None  # None: there is nothing to draw
    csv: Path | None = None
    svg: Path | None = None
    traces: Traces | None = None


def run(job: Job) -> int:
    """The exit code: 1 if something of fxopt's own failed, or said other tokens in float32, or not all was measured."""
    _check(job)
    machine = Machine.here(job.source.device)
    measuring = Measuring(job.source, job.lineup, job.effort, Progress(), job.traces)
    ended = ""
    try:
        with _ending_as_ctrl_c():
            for series in job.series:
                measuring.run(series)
    except KeyboardInterrupt:
        ended = "interrupted"
    except FxoptError as error:
        if not measuring.rows:
            raise
        ended = str(error)  # such as no room for a deeper model
    results = Results.of(measuring, machine)
    print(job.shown(results))
    _write(job, results)
    if ended:
        print(f"fxopt: {ended}; this is what was measured until then", file=sys.stderr)
        return INTERRUPTED if ended == "interrupted" else WRONG
    for one in results.wrong:
        said = one.trouble or f"its tokens are those of the stock model for the first {one.agreed} alone"
        print(f"fxopt: {one.contender}, {one.setting}: {said}", file=sys.stderr)
    return WRONG if results.wrong else 0


@contextlib.contextmanager
def _ending_as_ctrl_c() -> Iterator[None]:
    """A time limit ends a process by SIGTERM; an hour of measurements should not be lost with it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal arrives
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(job: Job) -> None:
    """Before anything is measured, whether what was measured can be kept."""
    longest = max(setting.max_len for series in job.series for setting in series.settings)
    limit = job.source.most_positions
    if limit is not None and longest > limit:
        raise InvalidRequestError(f"max_len {longest} was asked for, and {job.source.name} has {limit} positions")
    if job.csv is not None:
        records.check(job.csv)
    if job.svg is None:
        return
    if job.drawn is None:
        raise InvalidRequestError("one setting makes no picture; give several sizes of a kind, such as --batch 1 2 4")
    if not job.svg.parent.is_dir():
        raise InvalidRequestError(f"there is no folder {job.svg.parent} for {job.svg.name}; make it first")


def _write(job: Job, results: Results) -> None:
    if job.csv is not None and results.figures:
        records.append(job.csv, results)
        print(f"csv: {job.csv}", file=sys.stderr)
    if job.svg is not None and job.drawn is not None and results.figures:
        job.svg.write_text(draw(job.drawn(results), title(results)), encoding="utf-8")
        print(f"picture: {job.svg}", file=sys.stderr)
    if job.traces is not None and job.traces.folder.exists():
        print(f"traces: {job.traces.folder}; tensorboard --logdir {job.traces.folder}", file=sys.stderr)
