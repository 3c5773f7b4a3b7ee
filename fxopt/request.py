"""What a user asks of ``optimize``, apart from the model and the passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedModel

from fxopt.capture import capture
from fxopt.engine import Limits
from fxopt.lower import Backend, Compile
from fxopt.program import Program, whole_windows

#: When a rewritten graph is compared with the stock model.
Verify = Literal["final", "each", "off"]
VERIFICATIONS: tuple[str, ...] = get_args(Verify)


@dataclass(frozen=True)
class Request:
    """The options of one ``optimize``; see there."""

    max_len: int
    max_batch: int | None = None
    backend: Backend = "inductor"
    verify: Verify = "final"
    strict: bool = False
    chunk: int = 256
    compile: Compile = "auto"
    max_cache_bytes: int | None = None

    def captured(self, model: PreTrainedModel, *, twins: bool = True) -> Program:
        """The model as one graph, for what is asked here; see :func:`capture` for ``twins``."""
        return capture(
            model,
            max_len=self.max_len,
            capacity=whole_windows(self.max_len),
            backend=self.backend,
            compile=self.compile,
            twins=twins,
        )

    @property
    def limits(self) -> Limits:
        return Limits(self.chunk, self.max_batch, self.max_cache_bytes)
