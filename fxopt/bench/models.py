"""The stock models that are held: loaded when one is needed, and given back when none of its settings is left."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fxopt.bench.memory import tidy
from fxopt.bench.source import Source
from fxopt.progress import Progress


class Models:
    """By depth, each with its tokenizer."""

    def __init__(self, source: Source, progress: Progress) -> None:
        self._source = source
        self._progress = progress
        self._held: dict[int | None, tuple[Any, Any]] = {}

    def keep(self, depths: Collection[int | None]) -> None:
        """Those of these depths alone: there need not be room for others."""
        self._held = {layers: held for layers, held in self._held.items() if layers in depths}
        tidy()

    def of(self, layers: int | None) -> tuple[Any, Any]:
        if layers not in self._held:
            with self._progress.step(f"load {self._source}"):
                self._held[layers] = self._source.load(layers)
        return self._held[layers]
