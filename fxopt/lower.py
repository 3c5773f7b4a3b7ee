"""A specialised graph as something to call: Inductor, AOTAutograd alone, or plain FX.

Weights and cache buffers are lifted to inputs of the compiled code. One compiled graph then serves
every set of buffers, sees weights that are updated in place, and holds no memory of its own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from fxopt.in_place import InPlaceProof, prove_in_place
from fxopt.program import ATTENTION_MASK, INPUT_IDS, Program
from fxopt.views import shape

Backend = Literal["inductor", "aot_eager", "eager"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_lock = threading.Lock()  # Inductor's configuration and tracing context are process-wide


@dataclass
class Lowered:
    """A graph that runs; call it with one tensor per placeholder of its program."""

    program: Program
    call: Callable[..., Any]
    inputs: tuple[str, ...]
    weights: tuple[Tensor, ...]
    windowed: bool  # whether it takes a mask of any length, or one over the whole buffers
    proof: InPlaceProof | None = None
    launches: int | None = None  # kernels and library calls of one run, where the compiler says

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The logits."""
        logits: Tensor = self.outputs(tensors)[0]
        return logits

    def outputs(self, tensors: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Everything that the graph returns: the logits, and in the captured form keys and values."""
        outputs: Sequence[Tensor] = self.call(*(tensors[name] for name in self.inputs), *self.weights)
        return outputs


def lower(program: Program, backend: Backend) -> Lowered:
    """Compile one specialised program."""
    module, inputs, weights = _lift(program)
    examples = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    window = shape(program.placeholders()[ATTENTION_MASK])[1]
    windowed = isinstance(window, torch.SymInt)
    if backend == "eager":
        return Lowered(program, module, inputs, weights, windowed)
    with _lock, tracing(TracingContext(program.fake_mode)), torch.no_grad():
        if backend == "aot_eager":
            return Lowered(program, _aot_eager(module, examples), inputs, weights, windowed)
        call, text, code = _inductor(module, examples)
    batch = int(shape(program.placeholders()[INPUT_IDS])[0])
    proof = prove_in_place(text, program.facts, batch, str(window)) if text else None
    return Lowered(program, call, inputs, weights, windowed, proof, count_launches(code) if code else None)


def _lift(program: Program) -> tuple[GraphModule, tuple[str, ...], tuple[Tensor, ...]]:
    """The same graph with every weight as an input behind the others."""
    lifted = program.copy()
    graph = lifted.graph
    inputs = tuple(lifted.placeholders())
    last = lifted.placeholders()[inputs[-1]]
    by_name: dict[str, Node] = {}
    weights: list[Tensor] = []
    for node, weight in list(lifted.weights()):
        name = str(node.target)
        if name not in by_name:
            weights.append(weight)
            with graph.inserting_after(last):
                last = by_name[name] = graph.placeholder(name.replace(".", "_"))
            last.meta = dict(node.meta)
        node.replace_all_uses_with(by_name[name])
        graph.erase_node(node)
    return GraphModule(lifted.gm, graph), inputs, tuple(weights)


def _aot_eager(module: GraphModule, examples: list[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    compiled: Callable[..., Any] = aot_eager(module, examples)
    return compiled


def _inductor(module: GraphModule, examples: list[Any]) -> tuple[Callable[..., Any], str, str]:
    """Compile, and bring back the text of the graph that Inductor made code for, and that code."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    texts: list[str] = []
    codes: list[str] = []

    def listen(gm: GraphModule, inputs: Any, **options: Any) -> Any:
        compiled = compile_fx_inner(gm, inputs, **options)
        texts.append(getattr(compiled, "inductor_post_grad_graph_str", ""))
        codes.append(getattr(compiled, "source_code", ""))
        return compiled

    # Without AOTAutograd's own cache ``listen`` is always called; Inductor's cache still holds the code.
    with functorch_config.patch(enable_autograd_cache=False):
        call: Any = compile_fx(module, examples, inner_compile=listen)
    return call, "\n".join(texts), "\n".join(codes)


#: A statement of the generated ``call`` that runs a kernel or a library function.
_LAUNCH = re.compile(
    r"^ +(?:\w+ = )?(?:cpp_\w+\(|triton_\w+\.run\(|extern_kernels\.|torch\.ops\.(?!\w+\.\w*assert))", re.MULTILINE
)


def count_launches(code: str) -> int:
    """How many kernels the code that Inductor generated starts in one run."""
    return len(_LAUNCH.findall(code))
