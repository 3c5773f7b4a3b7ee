"""What can be said to a pass that streams something of every layer: how much stays, and where the rest lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from fxopt.errors import InvalidRequestError
from fxopt.offload.amounts import bytes_of
from fxopt.rewrite import Pass, Stage

StoreKind = Literal["disk", "cpu"]


@dataclass(frozen=True)
class StreamingPass(Pass[Any]):
    stage = Stage.CODE
    by_default: ClassVar[bool] = False

    #: Bytes that may be taken on the device, slots included: a number, or text such as ``"8GiB"``.
    budget: int | str | None = None
    #: Or the share of the layers that stays. A half, if neither is given.
    resident: float | None = None
    #: Slots; at least two are needed to read while something runs.
    depth: int | None = None
    #: Where the others lie: "disk", or "cpu" for memory of the host.
    store: StoreKind = "disk"
    #: The folder for what is put on disk.
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.store not in get_args(StoreKind):
            raise InvalidRequestError(f"store={self.store!r} is not one of {', '.join(get_args(StoreKind))}")
        if self.budget is not None:
            bytes_of("budget", self.budget)

    @property
    def budget_bytes(self) -> int | None:
        return None if self.budget is None else bytes_of("budget", self.budget)

    @property
    def share(self) -> float | None:
        """The share of the layers that stays, where there is no budget."""
        return 0.5 if self.resident is None and self.budget is None else self.resident

    @property
    def parent(self) -> Path | None:
        """The folder as a path."""
        return None if self.folder is None else Path(self.folder)
