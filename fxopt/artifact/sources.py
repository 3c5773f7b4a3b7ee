"""Where the weights of a graph come from: the model that is given, or a file of constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx import Graph

from fxopt.artifact.keys import named_tensors
from fxopt.artifact.plain import wrong
from fxopt.errors import ArtifactError
from fxopt.program import Facts, Program
from fxopt.rounded_weights import own_name
from fxopt.weight_formats import CodedWeight
from fxopt.weights import PACKED, joined


@dataclass(frozen=True)
class Source:
    """One weight: the model's own under one name, the rows of several, or a constant."""

    names: tuple[str, ...]  # of the model's weights; none for a constant
    part: int | None = None  # of the codes that are made of them


def sources_of(programs: Iterable[Program], model: nn.Module) -> tuple[dict[str, Source], dict[str, Tensor]]:
    """The source of every weight that the graphs read, and the values of those that are constants."""
    names = {id(tensor): name for name, tensor in named_tensors(model)}
    memory = {tensor.untyped_storage().data_ptr() for _, tensor in named_tensors(model)}
    captured = {_captured(name): name for name, _ in named_tensors(model)}
    sources: dict[str, Source] = {}
    constants: dict[str, Tensor] = {}
    for program in programs:
        coded = coded_parts(program.facts)
        for node, tensor in program.weights():
            target, parts = str(node.target), node.meta.get(PACKED, ())
            if target in coded:  # made anew of whatever weights the model has then
                one, part = coded[target]
                sources[target] = Source(tuple(captured[name] for name in one.of), part)
            elif id(tensor) in names:
                sources[target] = Source((names[id(tensor)],))
            elif parts and all(part in captured for part in parts):
                sources[target] = Source(tuple(captured[part] for part in parts))
            elif tensor.untyped_storage().data_ptr() in memory:
                raise ArtifactError(
                    f"the graph reads {target}, a part of a weight of the model that no name tells; it cannot be saved"
                )
            else:
                sources[target] = Source(())
                constants[target] = tensor
    return sources, constants


def coded_parts(facts: Facts) -> dict[str, tuple[CodedWeight, int]]:
    """Every part of a weight that lies in the graphs as codes, by its name there."""
    return {target: (one, part) for one in facts.weights for part, target in enumerate(one.parts)}


def note_parts(graph: Graph, sources: Mapping[str, Source]) -> None:
    """Say at every packed weight what it is made of, as packing does, so that the graph can be saved again."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        source = sources[str(node.target)]
        if len(source.names) > 1 and source.part is None:
            node.meta[PACKED] = tuple(map(_captured, source.names))


def _captured(name: str) -> str:
    """What the capture calls a weight of the model."""
    return f"model.{name}"


def constants_file(constants: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in constants.items()})


def read_constants(content: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{where} is no file of tensors ({error}); it is damaged. Save the model again") from None


def check_sources(
    sources: Mapping[str, Source], constants: Mapping[str, Tensor], model: nn.Module, facts: Facts, where: str
) -> None:
    """Raise a sentence on a weight that cannot be had from this model and these constants."""
    known = dict(named_tensors(model))
    coded = {target: (one.of, part) for target, (one, part) in coded_parts(facts).items()}
    for target, source in sources.items():
        parted = (tuple(map(_captured, source.names)), source.part) if source.part is not None else None
        if parted != coded.get(target):
            wrong(f"{where}.{target}", "what the facts say of codes", parted)
        if missing := [name for name in source.names if name not in known]:
            wrong(f"{where}.{target}", "a weight of the model", missing[0])
        if not source.names and target not in constants:
            wrong(f"{where}.{target}", "in the file of constants", "missing there")
        parts = [known[name] for name in source.names]
        kinds = {(part.dtype, part.shape[1:], part.device, part.dim() > 0) for part in parts}
        if len(kinds) > 1 or (len(parts) > 1 and not parts[0].dim()):
            wrong(f"{where}.{target}", "rows of the same kind", source.names)


def weights_from(
    sources: Mapping[str, Source], constants: Mapping[str, Tensor], model: nn.Module, facts: Facts
) -> dict[str, Tensor]:
    """Every weight by its name in the graphs. Rows that are read as one are moved into one storage."""
    known = dict(named_tensors(model))
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for one in facts.weights:
            own = [known[own_name(name)] for name in one.of]
            weights.update(zip(one.parts, one.encode(own), strict=True))
        for target, source in sources.items():
            parts = [known[name] for name in source.names]
            if source.part is not None:
                continue
            if not parts:
                weights[target] = constants[target].to(facts.device)
            else:
                weights[target] = parts[0] if len(parts) == 1 else joined(parts)
    return weights
