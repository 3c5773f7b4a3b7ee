"""Rows as figures: medians, speeds, ratios to the stock model, bytes a second."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.bench.answers import agreed
from fxopt.bench.row import Row
from fxopt.bench.setting import Setting
from fxopt.bench.timing import Run


@dataclass(frozen=True)
class Figures:
    """A row as it is shown. None stands for what was not measured."""

    contender: str
    setting: Setting
    rounds: int
    ready_s: float
    prefill_ms: float | None = None
    token_ms: float | None = None  # of a decode step, for all sequences
    decode_tok_s: float | None = None
    decode_to_stock: float | None = None
    tok_s: float | None = None  # new tokens of all sequences, from the prompt to the last one
    to_stock: float | None = None
    peak_mb: float | None = None
    read_gb_s: float | None = None
    of_read_speed: float | None = None
    text_hash: str = ""
    agreed: int | None = None  # tokens from the first on that are those of the stock model
    trouble: str | None = None

    @property
    def is_same(self) -> bool | None:
        return None if self.agreed is None else self.agreed == self.setting.new


def figures(row: Row, stock: Row | None, read_speed: float | None) -> Figures:
    """``stock`` is the row of the same setting that ratios and tokens are compared with."""
    common = {
        "contender": row.contender,
        "setting": row.setting,
        "rounds": len(row.runs),
        "ready_s": row.ready_s,
        "peak_mb": None if row.peak_bytes is None else row.peak_bytes / 1e6,
        "text_hash": row.text_hash,
        "agreed": _agreed(row, stock),
        "trouble": _trouble(row),
    }
    if not row.runs:
        return Figures(**common)  # type: ignore[arg-type]
    step = statistics.median(second for run in row.runs for second in run.steps)
    batch = row.setting.batch
    read = row.step_bytes / step
    other = stock.runs if stock is not None else []
    return Figures(
        **common,  # type: ignore[arg-type]
        prefill_ms=1e3 * statistics.median(run.prefill for run in row.runs),
        token_ms=1e3 * step,
        decode_tok_s=batch / step,
        decode_to_stock=_ratio([_step(run) for run in other], [_step(run) for run in row.runs]),
        tok_s=batch * row.setting.new / statistics.median(run.total for run in row.runs),
        to_stock=_ratio([run.total for run in other], [run.total for run in row.runs]),
        read_gb_s=read / 1e9,
        of_read_speed=None if not read_speed else read / read_speed,
    )


def _step(run: Run) -> float:
    return statistics.median(run.steps)


def _ratio(stock: Sequence[float], own: Sequence[float]) -> float | None:
    """How many times faster, as the median of the rounds: both ran in each, so both felt the machine's moods."""
    pairs = list(zip(stock, own, strict=False))  # Ctrl-C may end a round in the middle
    return statistics.median(one / other for one, other in pairs) if pairs else None


def _agreed(row: Row, stock: Row | None) -> int | None:
    if row.tokens is None or stock is None or stock.tokens is None:
        return None
    return agreed(row.tokens, stock.tokens)


def _trouble(row: Row) -> str | None:
    if row.trouble is None and not row.is_steady:
        return "its tokens changed from run to run"
    if row.trouble is None and not row.runs:
        return "not measured"
    return row.trouble
