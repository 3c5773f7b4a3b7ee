"""The weights of some layers lie on disk, and are read while earlier layers run.

    y = layer_7(x)      becomes      wait(layer 7)
                                     y = layer_7(x, weights in the slot)
                                     read layer 11 into the slot

Layers that stay and layers that are streamed alternate as evenly as the budget allows. What is
streamed goes through a ring of slots; the order of layers is known, and goes on with the first ones
while the head of the model runs. The graph does not change: weights are inputs of its pieces, and a
piece is handed a slot instead. It makes nothing faster. A model runs that is larger than the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fxopt.errors import InvalidRequestError
from fxopt.offload.amounts import bytes_of
from fxopt.rewrite import Pass, Stage

StoreKind = Literal["disk", "cpu"]


@dataclass(frozen=True)
class OffloadWeights(Pass[Any]):
    name = "offload_weights"
    summary = "streams the weights of layers from disk, for models that are larger than the memory"
    stage = Stage.CODE
    by_default: ClassVar[bool] = False

    #: Bytes that weights may take, slots included: a number, or text such as ``"8GiB"``.
    budget: int | str | None = None
    #: Or the share of the layers that stays. A half, if neither is given.
    resident: float | None = None
    #: Slots; at least two are needed to read while something runs.
    depth: int | None = None
    #: Where streamed weights lie: "disk", or "cpu" for memory of the host.
    store: StoreKind = "disk"
    #: The folder for a private folder with what is not read from the model's own files.
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
