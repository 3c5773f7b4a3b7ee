"""Packed weights: one storage, the model's own parameters as views of it.

A fusion pass writes ``cat([Wq, Wk, Wv])`` into the graph. Here that text becomes memory: the packed
tensor is filled one group at a time and the parameters are re-seated into it, so there is never a
second copy of more than one group, and ``state_dict``, ``save_pretrained``, in-place updates and
the stock model go on working.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.errors import InvalidRequestError
from fxopt.program import Program
from fxopt.views import Concat

PACKED = "packed"


def pack(program: Program) -> Program:
    """Replace every ``cat`` of weights by one packed weight; returns a new program."""
    packed = program.copy()
    graph = packed.graph
    groups: dict[int, list[int]] = {}  # by id, each weight with those that it is packed with
    with torch.no_grad():
        for node in list(graph.nodes):
            concat = Concat.of(node)
            if concat is None or not concat.joins_weights:
                continue
            tensors = [packed.attribute(part) for part in concat.parts]
            group = [id(tensor) for tensor in tensors]
            if len(set(group)) < len(group) or any(groups.get(weight, group) != group for weight in group):
                continue  # joined whenever the graph runs: no weight can lie in two places
            groups.update(dict.fromkeys(group, group))
            name = f"{PACKED}_{concat.parts[0].target}".replace(".", "_")
            packed.gm.register_buffer(name, joined(tensors))
            with graph.inserting_before(node):
                weight = graph.get_attr(name)
            weight.meta = {**node.meta, PACKED: tuple(str(part.target) for part in concat.parts)}
            node.replace_all_uses_with(weight)
            graph.erase_node(node)
            for part in concat.parts:
                if not part.users:
                    graph.erase_node(part)
    return packed.trimmed()


def packed_bytes(program: Program) -> int:
    """How much of the weights lies in packed storages."""
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and str(n.target).startswith(PACKED)}
    return sum(program.weight(name).nbytes for name in names)  # one of them may be read by several layers


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The weights as one tensor whose rows they are: moved into one storage unless they lie in one already."""
    return _adjacent(tensors) if are_adjacent(tensors) else _seat(tensors)


def code_bytes(program: Program) -> tuple[int, int]:
    """What codes and their scales take, and what the weights would that they stand for."""
    parts = {name: tensor for node, tensor in program.weights() if (name := str(node.target))}
    coded = [one for one in program.facts.weights if one.parts[0] in parts]
    numbers = sum(one.numbers([parts[name] for name in one.parts]) for one in coded)
    return sum(parts[name].nbytes for one in coded for name in one.parts), numbers * program.facts.dtype.itemsize


class WeightWatch:
    """Notices when parameters have moved or were replaced, as ``model.to(...)`` does with them.

    ``rounded`` names those that graphs have as codes: these must not be written to either.
    """

    def __init__(self, model: nn.Module, rounded: Collection[str] = ()) -> None:
        self._seen = [
            (f"{path}.{name}".lstrip("."), module._parameters, name, parameter, parameter.data_ptr())
            for path, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._rounded = [(name, (one := model.get_parameter(name)), _version(one)) for name in rounded]

    def check(self) -> None:
        for path, parameters, name, parameter, address in self._seen:
            if parameters.get(name) is not parameter or parameter.data_ptr() != address:
                raise InvalidRequestError(
                    f"{path} has moved since fxopt.optimize saw it (model.to(...), or a parameter was replaced), so "
                    "the optimised graphs would read the old weights. Call fxopt.optimize on the stock model again."
                )
        for path, parameter, version in self._rounded:
            if _version(parameter) != version:
                raise InvalidRequestError(
                    f"{path} was updated in place since quantize_weights rounded it, so the optimised graphs would go "
                    "on with codes of the old weights. Call fxopt.optimize on the stock model again."
                )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _seat(tensors: Sequence[Tensor]) -> Tensor:
    """Copy weights into one new storage and make each a view of its rows."""
    packed = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, rows in zip(tensors, packed.split([t.shape[0] for t in tensors]), strict=True):
        tensor.data = rows
    return packed


def are_adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether the weights lie one behind the other already, from an earlier packing."""
    if any(tensor.device.type == "meta" or isinstance(tensor, FakeTensor) for tensor in tensors):
        return False
    end = tensors[0].data_ptr()
    storage = tensors[0].untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage or not tensor.is_contiguous():
            return False
        end += tensor.nbytes
    return True


def _adjacent(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0].detach()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
