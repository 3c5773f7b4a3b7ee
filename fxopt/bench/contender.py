"""What takes part in a benchmark."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeAlias

from torch import Tensor

from fxopt.bench.setting import Setting
from fxopt.bench.subject import Subject

Stamp: TypeAlias = Callable[[], None]  # called when a token is there
Tokens: TypeAlias = list[list[int]]  # new ones, for each sequence


class Contender(ABC):
    """Something that generates greedily. An adapter is a few lines long."""

    #: How it is called in tables; no two in one table have the same.
    name: str

    #: Whether it computes with the stock model's own tensors, or with a copy that it read from a file.
    shares_weights: bool = True

    #: Whether fxopt answers for its tokens: in float32 they have to be those of the stock model.
    is_ours: ClassVar[bool] = False

    def why_not(self, subject: Subject, setting: Setting) -> str | None:
        """A sentence if it cannot take part here, such as a package that is not installed."""
        return None

    @abstractmethod
    def prepare(self, subject: Subject) -> None:
        """Everything that is done once for a model."""

    @abstractmethod
    def generate(self, prompt: Tensor, new: int, stamp: Stamp | None) -> Tokens:
        """``new`` tokens for each sequence of ``prompt`` [B, S], whatever they are; none of them ends it."""

    def release(self) -> None:
        """Give back the memory of caches that are kept for the next call."""
        return
