"""Results as lines of a CSV file, to which every run adds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxopt.bench.figures import Figures
from fxopt.bench.results import Results
from fxopt.errors import InvalidRequestError

Value = Callable[[Results, Figures], Any]

#: The columns in order, and where each value comes from.
COLUMNS: dict[str, Value] = {
    "date": lambda all_, _: all_.machine.date,
    "commit": lambda all_, _: all_.machine.commit,
    "fxopt": lambda all_, _: all_.machine.versions["fxopt"],
    "torch": lambda all_, _: all_.machine.versions["torch"],
    "transformers": lambda all_, _: all_.machine.versions["transformers"],
    "python": lambda all_, _: all_.machine.versions["python"],
    "device": lambda all_, _: all_.machine.device,
    "threads": lambda all_, _: all_.machine.threads,
    "load": lambda all_, _: all_.machine.load,
    "model": lambda all_, _: all_.model,
    "layers": lambda _, one: one.setting.layers,
    "dtype": lambda all_, _: all_.dtype,
    "batch": lambda _, one: one.setting.batch,
    "prompt": lambda _, one: one.setting.prompt,
    "new_tokens": lambda _, one: one.setting.new,
    "max_len": lambda _, one: one.setting.max_len,
    "axis": lambda _, one: one.axis,
    "contender": lambda _, one: one.contender,
    "rounds": lambda _, one: one.rounds,
    "ready_s": lambda _, one: one.ready_s,
    "prefill_ms": lambda _, one: one.prefill_ms,
    "decode_ms_per_token": lambda _, one: one.token_ms,
    "decode_tok_per_s": lambda _, one: one.decode_tok_s,
    "decode_to_stock": lambda _, one: one.decode_to_stock,
    "step_to_first": lambda _, one: one.step_to_first,
    "tok_per_s": lambda _, one: one.tok_s,
    "to_stock": lambda _, one: one.to_stock,
    "max_mem_mb": lambda _, one: one.peak_mb,
    "read_gb_per_s": lambda _, one: one.read_gb_s,
    "of_read_speed": lambda _, one: one.of_read_speed,
    "hash": lambda _, one: one.text_hash,
    "same_tokens": lambda _, one: one.agreed,
    "trouble": lambda _, one: one.trouble,
}
DIGITS = 4  # behind the point


def check(path: Path) -> None:
    """Before anything is measured: whether lines can be added there."""
    if not path.parent.is_dir():
        raise InvalidRequestError(f"there is no folder {path.parent} for {path.name}; make it, or give another file")
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file), [])
    if found != list(COLUMNS):
        raise InvalidRequestError(f"{path} has other columns than this version of fxopt writes; give another file")


def append(path: Path, results: Results) -> None:
    """Add a line for each contender in each setting; a new file gets a heading."""
    check(path)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerows([_plain(value(results, one)) for value in COLUMNS.values()] for one in results.figures)


def _plain(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
