"""A graph that Dynamo made, as a program that passes rewrite, and back again for a compiler.

Dynamo calls functions of PyTorch and hands every weight in as an input. Passes match ATen and read
weights by name. So the graph is traced once more, into ATen before any decomposition, under Dynamo's
own fake tensors and symbols, and its parameters become attributes; on the way back they are inputs
again, in their old places, with the packed weights behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from fxopt.program import Facts, Program
from fxopt.seats import why_not_joined
from fxopt.views import Concat, memory_of, mutates

aten = torch.ops.aten
MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")
#: Calls with bodies or kernels of their own that passes may see; others might write without saying so.
BODIES = frozenset({"cond", "flex_attention", "wrap_with_autocast", "wrap_with_set_grad_enabled"})


class LeftAlone(Exception):  # noqa: N818 - a verdict, not an error
    """Why a graph goes to the compiler as it is."""


def inputs_of(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def as_program(module: GraphModule, examples: Sequence[Any], backend: str) -> Program:
    """The graph in ATen with parameters as attributes; raises :class:`LeftAlone` with a reason."""
    if (reason := _why_alone(module, examples)) is not None:
        raise LeftAlone(reason)
    inputs = inputs_of(module)
    if any("example_value" not in node.meta for node in inputs):
        raise LeftAlone("it does not come from Dynamo directly, which notes an example for every input")
    values = [node.meta["example_value"] for node in inputs]
    fake_mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if fake_mode is None:
        raise LeftAlone("no tensor comes in")
    traced = _traced(module, values, fake_mode)
    names = {str(node.target) for node in inputs}
    for node, original, example in zip(inputs_of(traced), inputs, examples, strict=True):
        node.target = original.target
        node._rename(original.name)
        if type(example) is nn.Parameter:
            _make_attribute(traced, node, example)
    parameters = [example for example in examples if type(example) is nn.Parameter]
    program = Program(traced, _facts(parameters, backend), fake_mode)
    for node, value in program.weights():
        if str(node.target) not in names:  # a constant of the code, which tracing has faked in a mode of its own
            node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
    return program


def _why_alone(module: GraphModule, examples: Sequence[Any]) -> str | None:
    tensors = [example for example in examples if isinstance(example, torch.Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it may be differentiated; call the model under torch.no_grad() for the passes"
    if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
        return "autocast is on"
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, nn.Parameter, FakeTensor):
            return f"a {type(tensor).__name__} comes in, which is no plain tensor"
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            return "a tensor comes in that is sparse, or whose values are not what lies in memory"
    for node in module.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if node.meta.get("unbacked_bindings"):
            return f"{node} makes a size that depends on data"
        if name == "_enter_autocast" and node.args[2] is not False:
            return f"{node} switches autocast on"
        if name == "requires_grad_" or (name == "_set_grad_enabled" and node.args[0] and not torch.is_grad_enabled()):
            return f"{node} asks for gradients"
        if isinstance(node.target, torch._ops.HigherOrderOperator) and name not in BODIES:
            return f"{node} calls {name}, which passes cannot see into"
        if "functorch" in str(getattr(node.target, "__module__", "")):
            return f"{node} belongs to a transform of torch.func, within which tensors are not what they look like"
    return None


def _traced(module: GraphModule, values: Sequence[Any], fake_mode: Any) -> GraphModule:
    def run(*inputs: Any) -> Any:
        with preserve_node_meta():
            return Interpreter(module).run(*inputs)

    with fake_mode:
        traced = make_fx(run, pre_dispatch=True)(*values)
    for node in reversed(traced.graph.nodes):
        if getattr(node.target, "__name__", "") in MODES:  # _why_alone has seen that they change nothing
            traced.graph.erase_node(node)
        elif _reshapes(node) and memory_of(node).op == "placeholder":
            raise LeftAlone(f"{node} changes the shape of an input in place")
        elif _only_acts(node):
            raise LeftAlone(f"{node} is called for what it does, not for what it returns")
    return traced


def _reshapes(node: Node) -> bool:
    """Whether a call changes what its tensor looks like, not what is in it."""
    is_call = isinstance(node.target, torch._ops.OpOverload) and node.target is not aten.detach_.default
    return is_call and torch.Tag.inplace_view in node.target.tags  # type: ignore[union-attr]


def _only_acts(node: Node) -> bool:
    """Whether a call has an effect that its schema does not tell of, so that it would be taken for dead code."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is aten._assert_tensor_metadata.default:
        return False
    return not node.target._schema.returns and not mutates(node) and not node.is_impure()


def _make_attribute(module: GraphModule, node: Node, parameter: nn.Parameter) -> None:
    name = str(node.target)
    module.register_parameter(name, parameter)
    with module.graph.inserting_before(min(node.users, default=module.graph.output_node())):
        weight = module.graph.get_attr(name)
    weight.meta = node.meta
    node.replace_all_uses_with(weight)
    module.graph.erase_node(node)


def _facts(parameters: Sequence[nn.Parameter], backend: str) -> Facts:
    """Nothing is known of the model but where it is: no layers, no cache."""
    first = next((one for one in parameters if one.is_floating_point()), torch.empty(0))
    return Facts(
        layers=(),
        capacity=0,
        max_len=0,
        dtype=first.dtype,
        device=first.device,
        gated_mlps=0,
        split_qkv=0,
        grouped_layers=0,
        output_class=tuple,
        backend=backend,
    )


@dataclass(frozen=True)
class Lifted:
    """A graph for a compiler: the inputs of the original, then one for each group of packed weights."""

    module: GraphModule
    examples: list[Any]
    groups: list[tuple[int, ...]]  # positions of the parameters that a packed weight is made of
    packed_bytes: int


def lifted(program: Program, original: GraphModule, examples: Sequence[Any]) -> Lifted:
    """The program with its parameters as inputs again, where they were in ``original``."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    places: dict[str, int] = {}
    inputs: list[Node] = []
    for place, node in enumerate(inputs_of(original)):
        places[str(node.target)] = place
        inputs.append(_noted(graph.placeholder(str(node.target)), node))
    groups: dict[tuple[int, ...], Node] = {}
    for concat in _joins(program):
        group = tuple(places[str(part.target)] for part in concat.parts)
        if group not in groups:
            groups[group] = _noted(graph.placeholder(f"packed_{len(groups)}"), inputs[group[0]], is_made=True)
            groups[group].meta["val"] = concat.node.meta["val"]
        mapping[concat.node] = groups[group]
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr") and str(node.target) in places:
            mapping[node] = inputs[places[str(node.target)]]
        elif node not in mapping:
            mapping[node] = graph.node_copy(node, lambda read: mapping[read])
    graph.lint()
    module = GraphModule(program.gm, graph, class_name="Rewritten")
    for name, constant in list(module.named_buffers()):  # of the code; compilers ask of buffers whose they are
        delattr(module, name)
        setattr(module, name, constant)
    module.meta = copy.copy(original.meta)
    if hasattr(original, "_param_name_to_source"):
        module._param_name_to_source = original._param_name_to_source
    weights = [_empty_like(node.meta["val"]) for node in groups.values()]
    size = sum(weight.nbytes for weight in weights)
    return Lifted(module, [*examples, *weights], list(groups), size)


def _joins(program: Program) -> Iterator[Concat]:
    """The concatenations of parameters that passes have written, and that packing can replace."""
    for node in program.graph.nodes:
        concat = Concat.of(node) if "fxopt" in node.meta else None
        if concat is None or not concat.joins_weights:
            continue
        if why_not_joined([program.attribute(part) for part in concat.parts]) is None:
            yield concat


def _noted(node: Node, original: Node, *, is_made: bool = False) -> Node:
    """Say of an input what Dynamo says of another: whether its memory stays, and where it comes from."""
    node.meta = {name: value for name, value in original.meta.items() if name != "grapharg"}
    if hasattr(original, "_dynamo_source"):
        node._dynamo_source = None if is_made else original._dynamo_source
    return node


def _empty_like(value: Any) -> Any:
    """A fake tensor in the mode that the compiler works in."""
    with detect_fake_mode() or value.fake_mode:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
