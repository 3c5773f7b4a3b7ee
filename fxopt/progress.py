"""What is going on, on a terminal; silence in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO


class Progress:
    """Names the long step that is running, and keeps how long each took."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._shown = self._stream.isatty()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._write(f"\r\x1b[2K  {name} …")
        try:
            yield
        except BaseException:
            self._write(f"\r\x1b[2K✗ {name}\n")
            raise
        took = time.perf_counter() - started
        self.seconds[name] = took
        self._write(f"\r\x1b[2K✓ {name}  {took:.1f} s\n")

    def _write(self, text: str) -> None:
        if self._shown:
            self._stream.write(text)
            self._stream.flush()
