"""``offload_weights`` at work: decides which layers are streamed, moves their weights, feeds compiled pieces."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.chain import Chain, Code, Plan
from fxopt.errors import InvalidRequestError, RewriteError
from fxopt.file_weights import DTYPES, FilesInMemory, mapped, raw, seat
from fxopt.layer_weights import Group, layer_weights
from fxopt.offload.errors import StoreError
from fxopt.offload.folders import PrivateFolder
from fxopt.offload.measuring import bandwidth
from fxopt.offload.placement import Placement, place
from fxopt.offload.ring import Ring
from fxopt.offload.store import Extent, FileStore
from fxopt.offload.use import StreamUse
from fxopt.offload.watched_file import WatchedFile
from fxopt.offload.writing import ALIGN, Weight, write
from fxopt.passes.offload_weights import OffloadWeights
from fxopt.program import Facts, Program
from fxopt.rewrite import Pass
from fxopt.streamed_chain import StreamedChain, Views


def unstreamable(facts: Facts) -> str | None:
    """Why ``offload_weights`` cannot be applied, or None."""
    if facts.device.type != "cpu":
        return f"weights are streamed into the memory of a CPU so far, and the model is on {facts.device}"
    if facts.backend == "eager" or not facts.layered:
        return (
            f"it hands weights to one layer at a time, and here the graph is one piece (compile={facts.compile!r}, "
            f'backend={facts.backend!r}, {len(facts.layers)} layers); ask for compile="layer", with "inductor" or '
            '"aot_eager"'
        )
    return None


def admit_streams(passes: Iterable[Pass[Any]], facts: Facts) -> None:
    """Raise a sentence if weights are to be streamed, and cannot be."""
    if any(isinstance(one, OffloadWeights) for one in passes) and (why := unstreamable(facts)) is not None:
        raise InvalidRequestError(f"offload_weights cannot be applied: {why}")


def moved(passes: Iterable[Pass[Any]], program: Program, model: nn.Module) -> Streaming | None:
    """Move weights as the pass asks; None if everything fits into the budget. An error leaves the model as it was."""
    rewriter = next(one for one in passes if isinstance(one, OffloadWeights))
    layers = layer_weights(program, model)
    if layers is None:
        raise RewriteError(
            f"{rewriter.name} cannot be applied: in the graph of this model its layers cannot be told apart. Leave the "
            "pass out, or report the architecture"
        )
    sizes = [sum(_padded(group) for group in groups) for groups in layers]
    everything = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    fixed = sum(everything.values()) - sum(one.tensor.nbytes for groups in layers for g in groups for one in g)
    placed = place(sizes, fixed, budget=rewriter.budget_bytes, resident=rewriter.share, depth=rewriter.depth)
    if not placed.offloaded:
        return None
    made = Streaming(rewriter, placed, [layers[layer] for layer in placed.offloaded])
    made.settle(model)
    return made


@dataclass(frozen=True)
class _Seat:
    """A group of weights that is streamed: where in its slot it goes, and where in a file it comes from."""

    group: Group
    file: WatchedFile
    offset: int
    at: int


class Streaming:
    """The streamed layers of one model: a store, a ring, and where in a slot each weight is."""

    def __init__(self, rewriter: OffloadWeights, placed: Placement, layers: Sequence[Sequence[Group]]) -> None:
        self._folder: PrivateFolder | None = None
        self._own: WatchedFile | None = None
        foreign = FilesInMemory() if rewriter.store == "disk" else None
        seats, store = self._stored(rewriter, layers, foreign)
        if foreign is not None:
            for named in (named for groups in layers for group in groups for named in group):
                foreign.drop(named.tensor)
            foreign.close(but=set(store.files))
        self._seat(seats)
        nbytes = -(-max(placed.slot_bytes, *map(_end, seats)) // ALIGN) * ALIGN
        with torch.inference_mode(False):
            self._slots = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(placed.slots)]
        memories = [raw(slot) for slot in self._slots]
        order = range(len(layers))
        speed = bandwidth(store, order, memories[0])
        self.store = store
        self.ring = Ring(store, order, memories)
        in_place = sum(_nbytes(one.group) for layer in seats for one in layer if one.file is not self._own)
        self.use = StreamUse(placed, rewriter.store, placed.moved - in_place, in_place, speed)
        #: Address of every streamed group, with its end, its layer in the order of the ring, its place in the slot.
        self._table = sorted(
            (one.group[0].tensor.data_ptr(), one.group[0].tensor.data_ptr() + _nbytes(one.group), turn, one.at)
            for turn, layer in enumerate(seats)
            for one in layer
        )
        self._watched = [(p, one.file) for layer in seats for one in layer for p in one.group]
        self._versions: list[int] = []

    def settle(self, model: nn.Module) -> None:
        """Have in memory what is to stay there, also where it was loaded as a part of a mapped file."""
        if self.use.store != "disk":
            return
        files, streamed = FilesInMemory(), {id(p.tensor) for p, _ in self._watched}
        for parameter in model.parameters():
            if id(parameter) not in streamed and files.has(parameter):
                parameter.data = parameter.data.clone()

    def chain(self, plan: Plan, pieces: Sequence[Code], weights: Sequence[Tensor], kind: str) -> Chain:
        """The pieces of one graph, fed from the ring."""
        numbers = range(len(plan.inputs), plan.given)
        found = {number: seat for number, w in zip(numbers, weights, strict=True) if (seat := self._find(w))}
        views: dict[int, Views] = {}
        turns = []
        for position, step in enumerate(plan.steps):
            mine = [number for number in step.reads if number in found]
            if not mine:
                continue
            turns += sorted({found[number][0] for number in mine})
            views[position] = [
                [(number, _view(slot, found[number][1], weights[number - len(plan.inputs)])) for number in mine]
                for slot in self._slots
            ]
        if turns != list(self.ring.order):
            raise RuntimeError(
                f"the {kind} graph reads streamed layers in the order {turns}, and they are read from the store in "
                f"the order {list(self.ring.order)}"
            )
        return StreamedChain(plan, pieces, self.ring, views, self._look, kind)

    def _look(self) -> None:
        """Notice weights that were updated in place: slots may hold what they were before."""
        versions = [0 if p.tensor.is_inference() else p.tensor._version for p, _ in self._watched]
        if versions == self._versions:
            return
        changed = [both for both, now, old in zip(self._watched, versions, self._versions, strict=False) if now != old]
        for parameter, file in changed:
            if file is not self._own:
                raise StoreError(
                    f"{parameter.name} was updated in place, and it is read from {file.path}, which is not written to. "
                    "Load the model and call fxopt.optimize again"
                )
        if self._own is not None:
            self._own.renew()
        self.ring.forget()
        self._versions = versions

    def _find(self, weight: Tensor) -> tuple[int, int] | None:
        """The layer of a streamed weight, and its place in the slot."""
        address = weight.data_ptr()
        for start, end, turn, at in self._table:
            if start <= address < end:
                return turn, at + address - start
        return None

    def _stored(
        self, rewriter: OffloadWeights, layers: Sequence[Sequence[Group]], foreign: FilesInMemory | None
    ) -> tuple[list[list[_Seat]], FileStore]:
        """Find or write every group. Nothing of the model has changed when this fails."""
        places = {
            id(g): foreign.place_of_all([one.tensor for one in g]) if foreign else None
            for groups in layers
            for g in groups
        }
        new = [[group for group in groups if places[id(group)] is None] for groups in layers]
        made = None
        if any(new):
            where, path, fd = self._file(rewriter)
            made = write(fd, where, [[_entries(group) for group in groups] for groups in new])
            self._own = WatchedFile(path, fd)
        seats, extents = [], []
        for turn, groups in enumerate(layers):
            seated: list[_Seat] = []
            parts: list[Extent] = []
            at = 0
            if made is not None and new[turn]:
                assert self._own is not None
                start, at = made.blocks[turn]
                parts.append(Extent(self._own, start, at, 0))
                for group in new[turn]:
                    offset = made.weights[group[0].name]
                    seated.append(_Seat(group, self._own, offset, offset - start))
            for group in groups:
                if (found := places[id(group)]) is not None:
                    seated.append(_Seat(group, *found, at))
                    parts.append(Extent(*found, _nbytes(group), at))
                    at += _padded(group)
            seats.append(seated)
            extents.append(parts)
        return seats, FileStore(extents)

    def _file(self, rewriter: OffloadWeights) -> tuple[Path, Path, int]:
        """An open file of our own: a folder for sentences, its path, and a descriptor."""
        if rewriter.store == "cpu":
            if not hasattr(os, "memfd_create"):
                raise InvalidRequestError('store="cpu" needs files in memory, which Linux has; use store="disk"')
            fd = os.memfd_create("fxopt weights", os.MFD_CLOEXEC)
            return Path("memory"), Path(f"/proc/self/fd/{fd}"), fd
        self._folder = PrivateFolder(Path(rewriter.folder) if rewriter.folder is not None else None)
        path = self._folder.path / "weights.safetensors"
        return self._folder.path, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _seat(self, seats: Sequence[Sequence[_Seat]]) -> None:
        """Let the parameters lie in the files; what they had is let go of."""
        storages: dict[WatchedFile, torch.UntypedStorage] = {}
        for one in (one for layer in seats for one in layer):
            if one.file not in storages:
                storages[one.file] = mapped(one.file.path, one.file.size, shared=one.file is self._own)
            offset = one.offset
            for named in one.group:
                seat(named.tensor, storages[one.file], offset)
                offset += named.tensor.nbytes


def _entries(group: Group) -> list[Weight]:
    return [Weight(one.name, DTYPES[one.tensor.dtype], tuple(one.tensor.shape), raw(one.tensor)) for one in group]


def _nbytes(group: Group) -> int:
    return sum(one.tensor.nbytes for one in group)


def _padded(group: Group) -> int:
    return -(-_nbytes(group) // ALIGN) * ALIGN


def _end(seats: Sequence[_Seat]) -> int:
    return max((one.at + _padded(one.group) for one in seats), default=0)


def _view(slot: Tensor, at: int, weight: Tensor) -> Tensor:
    """What a weight is when it lies in a slot."""
    place = slot[at : at + weight.nbytes].view(weight.dtype)
    return place.as_strided(weight.shape, weight.stride())
