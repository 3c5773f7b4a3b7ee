"""The contenders for one subject: each is prepared when it is first needed, and what it keeps is counted."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from fxopt.bench.contender import Contender, Tokens
from fxopt.bench.memory import Meter, tidy
from fxopt.bench.row import Row
from fxopt.bench.subject import Subject
from fxopt.bench.traffic import weight_bytes
from fxopt.bench.trouble import noted
from fxopt.progress import Progress


class Field:
    """Those who run against each other. Without a meter nothing is weighed."""

    def __init__(
        self, contenders: Sequence[Contender], subject: Subject, meter: Meter | None, progress: Progress
    ) -> None:
        self.contenders = contenders
        self.subject = subject
        self._meter = meter
        self._progress = progress
        self._weights = weight_bytes(subject.model)
        self._kept: dict[str, int] = defaultdict(int)
        self._prepared: dict[str, str | None] = {}  # what went wrong, or None

    def prepare(self, contender: Contender, row: Row) -> None:
        """Once; what has failed would fail again."""
        if contender.name not in self._prepared:
            step = self._progress.step(f"prepare {contender.name}")
            with noted(row), step, self.keeping(contender), row.getting_ready():
                contender.prepare(self.subject)
            self._prepared[contender.name] = row.trouble
        row.trouble = self._prepared[contender.name]

    @contextlib.contextmanager
    def keeping(self, contender: Contender) -> Iterator[None]:
        """What stays when the caches are given back belongs to this contender."""
        if self._meter is None:
            yield
            return
        if contender.name in self._prepared:
            contender.release()
        tidy()
        before = self._meter.now()
        yield
        contender.release()
        tidy()
        self._kept[contender.name] += self._meter.now() - before

    def weighed(self, contender: Contender, prompt: Tensor, new: int) -> tuple[Tokens, int | None]:
        """What it says, and the memory there would be at most if it were alone: weights, what it keeps, the run."""
        if self._meter is None:
            return contender.generate(prompt, new, None), None
        contender.release()
        tidy()
        before = self._meter.now()
        self._meter.restart()
        tokens = contender.generate(prompt, new, None)
        own = self._kept[contender.name] + self._meter.peak() - before
        return tokens, own + (self._weights if contender.shares_weights else 0)
