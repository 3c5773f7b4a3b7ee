"""Which parameters belong to one layer alone, told from the pieces that a graph is cut into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fxopt.chain import Plan
from fxopt.file_weights import DTYPES
from fxopt.lower import planned
from fxopt.offload.writing import ALIGN
from fxopt.outline import outline
from fxopt.program import Program, key_name
from fxopt.specialise import Role, specialise
from fxopt.views import Concat


@dataclass(frozen=True)
class Named:
    """A parameter, and what the graph calls it."""

    name: str
    tensor: Tensor


Group = tuple[Named, ...]  # parameters that passes have joined: their rows are to lie behind each other


def nbytes_of(group: Group) -> int:
    return sum(named.tensor.nbytes for named in group)


def room_for(group: Group) -> int:
    """The bytes that a group takes in a slot."""
    return -(-nbytes_of(group) // ALIGN) * ALIGN


def layer_weights(program: Program, model: nn.Module) -> list[list[Group]] | None:
    """For each layer what it alone reads. None if the layers cannot be told apart.

    What several layers read stays out, as does what other modules than layers have, and what is no plain parameter.
    """
    decode, plan = _layered(program)
    places = _layer_steps(plan, len(program.facts.layers))
    if places is None:
        return None
    tensors = {name: decode.weight(name) for name in plan.weights}
    owners = _owners(plan, tensors)
    able = _movable(model)
    layers = []
    for place in places:
        own = [name for name, tensor in tensors.items() if owners[id(tensor)] == {place} and id(tensor) in able]
        layers.append(_grouped(decode, tensors, own))
    return layers


def layer_places(program: Program) -> list[int] | None:
    """Which of the pieces that its decode graph is cut into is each layer. None if the layers cannot be told apart."""
    return _layer_steps(_layered(program)[1], len(program.facts.layers))


def _layered(program: Program) -> tuple[Program, Plan]:
    decode = specialise(program, Role("decode", 1, longest_step=1))
    plan, _ = planned(decode, outline(decode, layered=True))
    return decode, plan


def _layer_steps(plan: Plan, layers: int) -> list[int] | None:
    """The position of the step that is each layer, if every layer is one."""
    found = [plan.readers([key_name(layer)]) for layer in range(layers)]
    places = [place for readers in found for place in readers]
    alone = len(places) == layers and places == sorted(set(places))
    return places if alone else None


def _owners(plan: Plan, tensors: dict[str, Tensor]) -> dict[int, set[int]]:
    """By id of each weight, the steps that read it; one weight may have several names."""
    owners: dict[int, set[int]] = defaultdict(set)
    names = dict(enumerate(plan.weights, len(plan.inputs)))
    for place, step in enumerate(plan.steps):
        for number in step.reads:
            if number in names:
                owners[id(tensors[names[number]])].add(place)
    return owners


def _movable(model: nn.Module) -> set[int]:
    """The ids of parameters that are whole, and share no memory with others."""
    found = sorted((p for p in model.parameters() if p.nbytes), key=lambda p: (p.data_ptr(), p.nbytes))
    able, end = dict.fromkeys(map(id, found), True), 0
    before: Tensor | None = None
    for parameter in found:
        if before is not None and parameter.data_ptr() < end:
            able[id(parameter)] = able[id(before)] = False
        end, before = max(end, parameter.data_ptr() + parameter.nbytes), parameter
    return {id(p) for p in found if able[id(p)] and p.is_contiguous() and p.dtype in DTYPES}


def _grouped(program: Program, tensors: dict[str, Tensor], own: Sequence[str]) -> list[Group]:
    """The weights of one layer; those that will be packed into one stand together, or stay out together."""
    left = {id(tensors[name]): name for name in own}
    groups: list[Group] = []
    for node in program.graph.nodes:
        concat = Concat.of(node)
        if concat is None or not concat.joins_weights:
            continue
        parts = [str(part.target) for part in concat.parts]
        ids = [id(tensors[name]) for name in parts if name in tensors]
        if left.keys().isdisjoint(ids):
            continue
        whole = len(ids) == len(parts) == len(set(ids)) and left.keys() >= set(ids)
        for each in ids:
            left.pop(each, None)
        if whole:
            groups.append(tuple(Named(name, tensors[name]) for name in parts))
    return [*groups, *((Named(name, tensors[name]),) for name in left.values())]
