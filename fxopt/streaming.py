"""``offload_weights`` at work: decides which layers are streamed, and feeds compiled pieces from a ring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.chain import Plan
from fxopt.device_blocks import blocks_for
from fxopt.device_lanes import lanes_of
from fxopt.errors import InvalidRequestError, RewriteError
from fxopt.file_weights import raw
from fxopt.layer_weights import layer_places, layer_weights, nbytes_of, room_for
from fxopt.moved_weights import MovedWeights, keep_in_memory
from fxopt.offload.errors import StoreError
from fxopt.offload.measuring import bandwidth
from fxopt.offload.placement import Placement, place
from fxopt.offload.ring import Ring
from fxopt.offload.store import Store
from fxopt.offload.use import WeightUse
from fxopt.passes.offload_kv import OffloadKV
from fxopt.passes.offload_weights import OffloadWeights
from fxopt.passes.quantize_weights import QuantizeWeights
from fxopt.program import Facts, Program
from fxopt.rewrite import Pass
from fxopt.row_streams import RowStreams
from fxopt.stream_options import StreamingPass
from fxopt.streamed_chain import RingFeed, Views


def admit_streams(passes: Iterable[Pass[Any]], facts: Facts) -> None:
    """Raise a sentence if weights or the cache are to be streamed, and cannot be."""
    passes = tuple(passes)
    if {OffloadWeights, QuantizeWeights} <= {type(one) for one in passes}:
        raise InvalidRequestError(
            "offload_weights streams the model's own weights, and with quantize_weights the graphs read codes instead; "
            "leave one of the two out (offload_kv goes with both)"
        )
    for rewriter in passes:
        if isinstance(rewriter, StreamingPass) and (why := _unstreamable(facts)) is not None:
            raise InvalidRequestError(f"{rewriter.name} cannot be applied: {why}")


def streamed_rows(passes: Iterable[Pass[Any]], program: Program, sequences: int) -> RowStreams | None:
    """How the rows of the cache are streamed, if a pass asks for it; raises if there is no room for ``sequences``."""
    rewriter = next((one for one in passes if isinstance(one, OffloadKV)), None)
    if rewriter is None:
        return None
    if layer_places(program) is None:
        raise _no_layers(rewriter)
    streams = RowStreams(rewriter, program.facts)
    streams.probe(sequences)
    return streams


def _no_layers(rewriter: StreamingPass) -> RewriteError:
    return RewriteError(
        f"{rewriter.name} cannot be applied: in the graph of this model its layers cannot be told apart. Leave the "
        "pass out, or report the architecture"
    )


def moved(passes: Iterable[Pass[Any]], program: Program, model: nn.Module) -> WeightStreams | None:
    """Move weights as the pass asks; None if everything fits into the budget. An error leaves the model as it was."""
    rewriter = next(one for one in passes if isinstance(one, OffloadWeights))
    layers = layer_weights(program, model)
    if layers is None:
        raise _no_layers(rewriter)
    sizes = [sum(map(room_for, layer)) for layer in layers]
    everything = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    fixed = sum(everything.values()) - sum(nbytes_of(group) for layer in layers for group in layer)
    placed = place(sizes, fixed, budget=rewriter.budget_bytes, resident=rewriter.share, depth=rewriter.depth)
    if not placed.offloaded:
        return None
    weights = MovedWeights([layers[layer] for layer in placed.offloaded], rewriter.store, rewriter.parent)
    streams = WeightStreams(weights, placed, rewriter.store, program.facts.device)
    if rewriter.store == "disk":
        keep_in_memory(model, but={id(named.tensor) for named in weights.parameters()})
    return streams


class WeightStreams:
    """The streamed layers of one model: a ring, and where in a slot each weight is."""

    def __init__(self, weights: MovedWeights, placed: Placement, kind: str, device: torch.device) -> None:
        try:
            self._begin(weights, placed, kind, device)
        except BaseException:  # memory, or memory that can be pinned, has run out
            weights.discard()
            raise
        weights.reseat()
        self._weights = weights
        self._table = weights.table()
        self._watched = [(named, one.file) for seats in weights.seats for one in seats for named in one.group]
        self._versions: list[int] = []

    def _begin(self, weights: MovedWeights, placed: Placement, kind: str, device: torch.device) -> None:
        lanes, order = lanes_of(device), range(len(placed.offloaded))
        if lanes is None:
            with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
                self._slots = [torch.empty(weights.slot_bytes, dtype=torch.uint8) for _ in range(placed.slots)]
            memories: Sequence[Any] = [raw(slot) for slot in self._slots]
            store: Store = weights.store
        else:
            memories = self._slots = [lanes.room(weights.slot_bytes) for _ in range(placed.slots)]
            store = blocks_for(lanes, weights.store, weights.memory if kind == "cpu" else None)
        speed = bandwidth(store, order, memories[0], lanes)
        self.ring = Ring(store, order, memories, lanes=lanes, at_once=lanes is not None and kind == "cpu")
        self.use = WeightUse(
            placement=placed,
            store=kind,
            device=str(device),
            context=0,
            bandwidth=speed,
            written=placed.moved - weights.in_place,
            in_place=weights.in_place,
        )

    def feed(self, plan: Plan, weights: Sequence[Tensor], kind: str) -> RingFeed:
        """What brings weights to the pieces of one graph."""
        known = dict(enumerate(weights, len(plan.inputs)))
        found = {number: place for number, weight in known.items() if (place := self._find(weight)) is not None}
        views: dict[int, Views] = {}
        turns: list[int] = []
        for position, step in enumerate(plan.steps):
            mine = [number for number in step.reads if number in found]
            if mine:
                turns += sorted({found[number][0] for number in mine})
                views[position] = [
                    [(number, _view(slot, found[number][1], known[number])) for number in mine] for slot in self._slots
                ]
        if turns != list(self.ring.order):
            raise RuntimeError(f"it reads streamed layers in the order {turns}, and not in that of the store")
        # A file in memory does not tell that it was written to through parameter.data: prompts begin anew.
        look = self._look if self.use.store == "disk" or kind == "decode" else self._look_anew
        return RingFeed(self.ring, views, look=look)

    def _look_anew(self) -> None:
        self.ring.forget()
        self._look()

    def _look(self) -> None:
        """Notice weights that were updated in place: slots may hold what they were before."""
        versions = [0 if one.tensor.is_inference() else one.tensor._version for one, _ in self._watched]
        if versions == self._versions:
            return
        own = self._weights.own
        for (named, file), now, old in zip(self._watched, versions, self._versions, strict=False):  # none at first
            if now != old and file is not own:
                raise StoreError(
                    f"{named.name} was updated in place, and it is read from {file.path}, which is not written to. "
                    "Load the model and call fxopt.optimize again"
                )
        if own is not None:
            own.renew()
        self.ring.forget()
        self._versions = versions

    def _find(self, weight: Tensor) -> tuple[int, int] | None:
        """The turn of the layer that a streamed weight belongs to, and its place in the slot."""
        address = weight.data_ptr()
        found = (entry for entry in self._table if entry[0] <= address < entry[1])
        return next(((turn, at + address - start) for start, _, turn, at in found), None)


def _unstreamable(facts: Facts) -> str | None:
    if facts.device.type not in ("cpu", "cuda"):
        return f"layers are streamed to a CPU or a CUDA device, and the model is on {facts.device}"
    if facts.backend == "eager" or not facts.layered:
        return (
            f"it hands slots to one layer at a time, and here the graph is one piece (compile={facts.compile!r}, "
            f'backend={facts.backend!r}, {len(facts.layers)} layers); ask for compile="layer", with "inductor" or '
            '"aot_eager"'
        )
    return None


def _view(slot: Tensor, at: int, weight: Tensor) -> Tensor:
    """What a weight is when it lies in a slot."""
    place = slot[at : at + weight.nbytes].view(weight.dtype)
    return place.as_strided(weight.shape, weight.stride())
