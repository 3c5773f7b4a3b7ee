"""What a pass is: it finds places, says which it must leave alone, and rewrites the others."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import ClassVar, Generic, Protocol, TypeVar

from torch.fx import Node

from fxopt.program import Program
from fxopt.views import Miss


class Stage(Enum):
    """Which graph a pass rewrites."""

    SYMBOLIC = "symbolic"  # the one captured graph, any batch and any number of new tokens
    DECODE = "decode"  # the graph specialised to one new token
    CODE = "code"  # every graph at the moment when it is compiled, or none: such a pass says how


class Located(Protocol):
    """A place in the graph; ``node`` stands for it in reports."""

    @property
    def node(self) -> Node: ...


Site = TypeVar("Site", bound=Located)


class Refused(Exception):  # noqa: N818 - a verdict, not an error
    """Raised by a pass that finds half way that it must not go on; the driver drops its draft."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.reason = reason


class Pass(Generic[Site]):
    """One rewrite. Subclasses are frozen dataclasses whose fields are the pass's options.

    ``find`` yields the places (and a :class:`Miss` for what looks like one up to a point),
    ``refuse`` says in a sentence why one must be left alone (or None), ``rewrite`` edits one,
    ``finish`` edits what only the whole graph can tell. Lint, dead code, shapes of new nodes,
    stamps, counts, timing and roll-back are the driver's.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    stage: ClassVar[Stage] = Stage.SYMBOLIC
    required: ClassVar[bool] = False
    by_default: ClassVar[bool] = True  # or only where somebody asks for it
    after: ClassVar[str | None] = None  # the pass behind which it goes; None: behind all of its stage

    def expected(self, program: Program) -> int | None:
        """How many sites the model's own structure says there are; None when it says nothing."""
        return None

    def find(self, program: Program) -> Iterator[Site | Miss]:
        raise NotImplementedError

    def refuse(self, program: Program, site: Site) -> str | None:
        return None

    def rewrite(self, program: Program, site: Site) -> None:
        raise NotImplementedError

    def finish(self, program: Program, matched: int) -> None:
        """Called once when every site is done."""
