"""The contender that all this is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxopt.api import optimize
from fxopt.bench.contender import Contender, Stamp, Tokens
from fxopt.bench.stock import generated
from fxopt.bench.subject import Subject
from fxopt.lower import Backend, Compile
from fxopt.request import Verify
from fxopt.rewrite import Pass


@dataclass
class Ours(Contender):
    """``fxopt.optimize`` with some passes."""

    is_ours = True

    name: str
    passes: Sequence[Pass[Any]]
    backend: Backend = "inductor"
    compile: Compile = "auto"
    verify: Verify = "final"

    def prepare(self, subject: Subject) -> None:
        self._fast: Any = optimize(
            subject.model,
            subject.max_len,
            passes=self.passes,
            max_batch=subject.max_batch,
            backend=self.backend,
            compile=self.compile,
            verify=self.verify,
        )

    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        return generated(self._fast, prompt, new, stamp)

    def release(self) -> None:
        self._fast.fxopt.release()
