"""A pass at some of its places only: how bisecting narrows a fault down, and how a user works around one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import Miss


@dataclass(frozen=True)
class Numbered:
    """A site with its number in the order in which the pass finds them."""

    number: int
    site: Any

    @property
    def node(self) -> Node:
        node: Node = self.site.node
        return node


@dataclass(frozen=True)
class Only(Pass[Numbered]):
    """``inner`` at the sites with these numbers; it goes by the name of ``inner``."""

    inner: Pass[Any]
    sites: Collection[int]

    def __post_init__(self) -> None:
        for attribute in ("name", "summary", "stage", "required", "by_default", "after"):
            object.__setattr__(self, attribute, getattr(self.inner, attribute))

    def expected(self, program: Program) -> int | None:
        return self.inner.expected(program)

    def find(self, program: Program) -> Iterator[Numbered | Miss]:
        number = 0
        for found in self.inner.find(program):
            if isinstance(found, Miss):
                yield found
            else:
                yield Numbered(number, found)
                number += 1

    def refuse(self, program: Program, site: Numbered) -> str | None:
        if site.number not in self.sites:
            return f"{site.node} is not one of the chosen sites"
        return self.inner.refuse(program, site.site)

    def rewrite(self, program: Program, site: Numbered) -> None:
        self.inner.rewrite(program, site.site)

    def finish(self, program: Program, matched: int) -> None:
        self.inner.finish(program, matched)
