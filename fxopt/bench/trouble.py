"""What becomes of a contender that fails: a row that says so, while the others go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fxopt.bench.memory import tidy
from fxopt.bench.row import Row
from fxopt.errors import FxoptError, first_line

OUT_OF_MEMORY = "out of memory"
_CPU_ALLOCATOR = "can't allocate memory"


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """An error inside becomes the trouble of ``row``."""
    try:
        yield
    except Exception as error:
        row.trouble = _said(error)
    if row.trouble is not None:
        tidy()  # the error held the frames, and they the tensors


def _said(error: Exception) -> str:
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    sentence = first_line(error)
    return sentence if isinstance(error, FxoptError) else f"{type(error).__name__}: {sentence}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also where another error was made of it."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
