"""Rows as figures: medians, speeds, ratios to the stock model, bytes a second."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from fxopt.bench.answers import agreed
from fxopt.bench.row import Row
from fxopt.bench.setting import Setting
from fxopt.bench.timing import Run
from fxopt.bench.trouble import OUT_OF_MEMORY

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Figures:
    """A row as it is shown. None stands for what was not measured."""

    contender: str
    setting: Setting
    is_ours: bool
    rounds: int
    ready_s: float
    axis: str = ""  # along which its setting took turns with others
    ready_to_first: float | None = None  # how many times as long as in the first setting of the axis
    prefill_ms: float | None = None
    token_ms: float | None = None  # of a decode step, for all sequences
    decode_tok_s: float | None = None
    decode_to_stock: float | None = None
    decode_to_before: float | None = None  # to the row above
    step_to_first: float | None = None  # how many times as long as in the first setting of the axis
    tok_s: float | None = None  # new tokens of all sequences, from the prompt to the last one
    to_stock: float | None = None
    to_before: float | None = None
    peak_mb: float | None = None
    read_gb_s: float | None = None
    of_read_speed: float | None = None  # of a plain read in the same round
    text_hash: str = ""
    agreed: int | None = None  # tokens from the first on that are those of the stock model
    trouble: str | None = None

    @property
    def is_same(self) -> bool | None:
        return None if self.agreed is None else self.agreed == self.setting.new

    @property
    def has_failed(self) -> bool:
        """Other than by a lack of memory, or of patience."""
        return self.trouble not in (None, OUT_OF_MEMORY, NOT_MEASURED)


def figures(row: Row, stock: Row | None, before: Row | None, first: Row | None) -> Figures:
    """``stock`` and ``before`` are rows of the same setting: which all are compared with, and which stands above.

    ``first`` is the same contender in the first setting of an axis.
    """
    bare = Figures(
        row.contender,
        row.setting,
        row.is_ours,
        len(row.runs),
        row.ready_s,
        row.axis,
        peak_mb=None if row.peak_bytes is None else row.peak_bytes / 1e6,
        text_hash=row.text_hash,
        agreed=_agreed(row, stock),
        trouble=_trouble(row),
    )
    if not row.runs:
        return bare
    step = statistics.median(second for run in row.runs for second in run.steps)
    batch = row.setting.batch
    return replace(
        bare,
        ready_to_first=row.ready_s / first.ready_s if first is not None and first.runs else None,
        prefill_ms=1e3 * statistics.median(run.prefill for run in row.runs),
        token_ms=1e3 * step,
        decode_tok_s=batch / step,
        decode_to_stock=_ratio(stock, row, _step),
        decode_to_before=_ratio(before, row, _step),
        step_to_first=_ratio(row, first, _step),
        tok_s=batch * row.setting.new / statistics.median(run.total for run in row.runs),
        to_stock=_ratio(stock, row, _total),
        to_before=_ratio(before, row, _total),
        read_gb_s=row.step_bytes / step / 1e9,
        of_read_speed=_of_read_speed(row),
    )


def _step(run: Run) -> float:
    return statistics.median(run.steps)


def _total(run: Run) -> float:
    return run.total


def _of_read_speed(row: Row) -> float | None:
    """The median of the rounds: a machine may read memory at another speed in each."""
    shares = [row.step_bytes / _step(run) / run.read_speed for run in row.runs if run.read_speed]
    return statistics.median(shares) if shares else None


def _ratio(longer: Row | None, shorter: Row | None, seconds: Callable[[Run], float]) -> float | None:
    """How many times as long, as the median of the rounds: both ran in each, so both felt the machine's moods."""
    if longer is None or shorter is None:
        return None
    pairs = list(zip(longer.runs, shorter.runs, strict=False))  # Ctrl-C may end a round in the middle
    return statistics.median(seconds(one) / seconds(two) for one, two in pairs) if pairs else None


def _agreed(row: Row, stock: Row | None) -> int | None:
    if row.tokens is None or stock is None or stock.tokens is None:
        return None
    return agreed(row.tokens, stock.tokens)


def _trouble(row: Row) -> str | None:
    if row.trouble is None and not row.is_steady:
        return "its tokens changed from run to run"
    if row.trouble is None and not row.runs:
        return NOT_MEASURED
    return row.trouble
