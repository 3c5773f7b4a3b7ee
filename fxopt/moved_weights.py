"""Weights that have left the memory: each group of a streamed layer lies in a file, and parameters lie there too.

A group that lies in a file of the model as it is, is left there. All others go to one file of our own,
on disk or in memory. Until :meth:`MovedWeights.reseat` nothing of the model has changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxopt.file_weights import DTYPES, FilesInMemory, mapped, raw, seat
from fxopt.layer_weights import Group, Named, nbytes_of, room_for
from fxopt.offload.folders import PrivateFolder
from fxopt.offload.memory_files import memory_file
from fxopt.offload.reading import forget
from fxopt.offload.store import Extent, FileStore
from fxopt.offload.watched_file import WatchedFile
from fxopt.offload.writing import Weight, Written, write

Layer = Sequence[Group]


@dataclass(frozen=True)
class Seat:
    """A group of weights: where in a file it lies, and where in a slot it goes."""

    group: Group
    file: WatchedFile
    offset: int
    at: int


class MovedWeights:
    """The weights of some layers, moved to files. ``kind`` is "disk", or "cpu" for a file in memory."""

    def __init__(self, layers: Sequence[Layer], kind: str, folder: Path | None) -> None:
        self.own: WatchedFile | None = None
        self._folder: PrivateFolder | None = None
        self._kind, self._parent = kind, folder
        files = FilesInMemory() if kind == "disk" else FilesInMemory.none()
        places = {id(group): files.place_of_all([one.tensor for one in group]) for layer in layers for group in layer}
        new = [[group for group in layer if places[id(group)] is None] for layer in layers]
        made = self._written(new) if any(new) else None
        self.seats = [_seats(layer, places, self.own, made, turn) for turn, layer in enumerate(layers)]
        self.store = FileStore([_extents(seats, self.own, made, turn) for turn, seats in enumerate(self.seats)])
        for named in self.parameters():
            files.drop(named.tensor)
        files.close(but=set(self.store.files))
        self._storages = {one: mapped(one.path, one.size, shared=one is self.own) for one in self.store.files}
        for extent in (extent for layer in self.store.layers for extent in layer):
            forget(extent.file.fd, extent.offset, extent.nbytes)

    @property
    def slot_bytes(self) -> int:
        return max(one.at + room_for(one.group) for seats in self.seats for one in seats)

    @property
    def memory(self) -> torch.UntypedStorage:
        """Our own file, as it is mapped."""
        assert self.own is not None
        return self._storages[self.own]

    def discard(self) -> None:
        """Let go of the files: nothing was moved there."""
        self.store.close()
        if self._folder is not None:
            self._folder.remove()

    @property
    def in_place(self) -> int:
        """Bytes in the model's own files."""
        return sum(nbytes_of(one.group) for seats in self.seats for one in seats if one.file is not self.own)

    def parameters(self) -> Iterator[Named]:
        yield from (named for seats in self.seats for one in seats for named in one.group)

    def table(self) -> list[tuple[int, int, int, int]]:
        """Where each group begins in memory and ends, the turn of its layer, and its place in the slot."""
        return sorted(
            (one.group[0].tensor.data_ptr(), one.group[0].tensor.data_ptr() + nbytes_of(one.group), turn, one.at)
            for turn, seats in enumerate(self.seats)
            for one in seats
        )

    def _written(self, layers: Sequence[Layer]) -> Written:
        where, path, fd = self._file()
        self.own = WatchedFile(path, fd)
        try:
            made = write(fd, where, [[_entries(group) for group in layer] for layer in layers])
        except BaseException:
            self.own.close()
            if self._folder is not None:
                self._folder.remove()
            raise
        self.own.renew()
        return made

    def _file(self) -> tuple[Path, Path, int]:
        """An open file: the folder for sentences, its path, and a descriptor."""
        if self._kind == "cpu":
            fd = memory_file("fxopt weights")
            return Path("memory"), Path(f"/proc/self/fd/{fd}"), fd
        self._folder = PrivateFolder(self._parent)
        path = self._folder.path / "weights.safetensors"
        return self._folder.path, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def reseat(self) -> None:
        """Let the parameters lie in the files; what they had is let go of."""
        for one in (one for seats in self.seats for one in seats):
            offset = one.offset
            for named in one.group:
                seat(named.tensor, self._storages[one.file], offset)
                offset += named.tensor.nbytes


def keep_in_memory(model: nn.Module, but: set[int]) -> None:
    """Copy weights that stay, and were loaded as parts of mapped files, into memory of their own."""
    files = FilesInMemory()
    for parameter in model.parameters():
        if id(parameter) not in but and files.has(parameter):
            parameter.data = parameter.data.clone()


def _seats(
    layer: Layer,
    places: dict[int, tuple[WatchedFile, int] | None],
    own: WatchedFile | None,
    made: Written | None,
    turn: int,
) -> list[Seat]:
    """Where the groups of a layer lie: first what was written, as it was written, then what lies elsewhere."""
    seats, at = [], 0
    if own is not None and made is not None:
        start, at = made.blocks[turn]
        new = [(group, made.weights[group[0].name]) for group in layer if places[id(group)] is None]
        seats = [Seat(group, own, offset, offset - start) for group, offset in new]
    for group in layer:
        if (found := places[id(group)]) is not None:
            seats.append(Seat(group, *found, at))
            at += room_for(group)
    return seats


def _extents(seats: Sequence[Seat], own: WatchedFile | None, made: Written | None, turn: int) -> list[Extent]:
    """What is read for one layer: what was written in one go."""
    block = [Extent(own, *made.blocks[turn], 0)] if own is not None and made is not None else []
    elsewhere = [Extent(one.file, one.offset, nbytes_of(one.group), one.at) for one in seats if one.file is not own]
    return [extent for extent in (*block, *elsewhere) if extent.nbytes]


def _entries(group: Group) -> list[Weight]:
    return [_entry(one.name, one.tensor) for one in group]


def _entry(name: str, tensor: Tensor) -> Weight:
    """Read when it is written: those of a device come into memory one by one."""
    return Weight(name, DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, lambda: raw(tensor.cpu()))
