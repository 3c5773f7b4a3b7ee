"""A specialised graph as something to call: Inductor, AOTAutograd alone, or plain FX.

Weights and cache buffers are inputs of the compiled code. One compiled graph then serves every set
of buffers, sees weights that are updated in place, and holds no memory of its own.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from fxopt.arena_memory import SharedArena
from fxopt.chain import Chain, Code, Plan, Step
from fxopt.errors import first_line
from fxopt.in_place import InPlaceProof, prove_in_place
from fxopt.outline import Region, outline
from fxopt.placement import ArenaUse, placement
from fxopt.program import ATTENTION_MASK, Program, key_name
from fxopt.shape_sets import Axes, ShapeSet
from fxopt.streamed_chain import Feed
from fxopt.views import shape

Backend = Literal["inductor", "aot_eager", "eager"]
BACKENDS: tuple[str, ...] = get_args(Backend)

Compile = Literal["auto", "layer", "whole"]
COMPILES: tuple[str, ...] = get_args(Compile)

#: Makes a chain of a plan, the code of its pieces and its weights.
ChainMaker = Callable[[Plan, Sequence[Code], Sequence[Tensor]], Chain]
log = logging.getLogger("fxopt")

_lock = threading.Lock()  # Inductor's configuration and tracing context are process-wide


class Away(Protocol):
    """Inputs of a graph that are brought while it runs; its chain has to be one that takes them."""

    @property
    def names(self) -> Collection[str]: ...

    def feed(self, plan: Plan) -> Feed: ...


@dataclass
class Lowered:
    """A graph that runs; call it with one tensor per placeholder of its program."""

    source: Callable[[], Program]  # a saved graph is made when it is first asked for
    call: Callable[..., Sequence[Tensor]]
    plan: Plan
    weights: tuple[Tensor, ...]
    windowed: bool  # whether it takes a mask of any length, or one over the whole buffers
    proof: InPlaceProof | None = None
    launches: int | None = None  # kernels and library calls of one run, where the compiler says
    arena_use: ArenaUse | None = None  # where one was asked for

    @property
    def program(self) -> Program:
        """The graph that was compiled."""
        return self.source()

    def __call__(self, tensors: Mapping[str, Tensor], away: Away | None = None) -> Tensor:
        """The logits."""
        return self.outputs(tensors, away)[0]

    def outputs(self, tensors: Mapping[str, Tensor], away: Away | None = None) -> Sequence[Tensor]:
        """Everything that the graph returns: the logits, and in the captured form keys and values."""
        return self._bound(tensors, away)()

    def bound(self, tensors: Mapping[str, Tensor], away: Away | None = None) -> Callable[[], Tensor]:
        """The same call, to be made again and again on the same tensors."""
        call = self._bound(tensors, away)
        return lambda: call()[0]

    def _bound(self, tensors: Mapping[str, Tensor], away: Away | None) -> Callable[[], Sequence[Tensor]]:
        if away is None:
            given = [*(tensors[name] for name in self.plan.inputs), *self.weights]
            return lambda: self.call(*given)
        here = [None if name in away.names else tensors[name] for name in self.plan.inputs]
        feed = away.feed(self.plan)
        return lambda: self.call(*here, *self.weights, own=feed)


def lower(
    program: Program,
    backend: Backend,
    *,
    layered: bool = False,
    arena: SharedArena | None = None,
    shape_sets: Sequence[ShapeSet] = (),
    chain: ChainMaker | None = None,
) -> Lowered:
    """Compile one specialised program, in one piece or layer by layer.

    With an ``arena`` Inductor's code computes in there, by a plan for ``shape_sets``. ``chain`` puts the pieces in a
    row in another way.
    """
    regions = outline(program, layered=layered and backend != "eager")
    plan, distinct = planned(program, regions)
    weights = tuple(program.weight(name) for name in plan.weights)
    windowed = isinstance(shape(program.placeholders()[ATTENTION_MASK])[1], torch.SymInt)
    if backend == "eager":
        return Lowered(lambda: program, Chain(plan, [distinct[0].module]), plan, weights, windowed)
    with compiling(program):
        if arena is None:
            compiled = [_compiled(region, backend) for region in distinct]
        else:
            numbers = [Axes(program).numbers(shapes).by_symbol for shapes in shape_sets]
            compiled = [_compiled_into(region, arena.device, numbers) for region in distinct]
    codes = [piece.call for piece in compiled]
    call: Code = Chain(plan, codes) if chain is None else chain(plan, codes, weights)
    use = None
    if arena is not None:
        handed_on = max(plan.most_alive(_bytes(program, regions, plan, shapes)) for shapes in shape_sets)
        counts = Counter(step.piece for step in plan.steps)
        pieces = tuple(placement(piece.source) for piece in compiled)
        use = ArenaUse(pieces, tuple(counts[number] for number in range(len(pieces))), handed_on)
        arena.reserve(use.arena)
        call = arena.running(call)
    if not all(piece.text and piece.source for piece in compiled):
        return Lowered(lambda: program, call, plan, weights, windowed, arena_use=use)
    runs = [compiled[step.piece] for step in plan.steps]
    proof = _proof(program, [piece.text for piece in runs])
    launches = sum(count_launches(piece.source) for piece in runs)
    return Lowered(lambda: program, call, plan, weights, windowed, proof, launches, use)


def _bytes(program: Program, regions: Sequence[Region], plan: Plan, shapes: ShapeSet) -> dict[int, int]:
    """The bytes of every value that a piece hands on, by its number."""
    numbers = Axes(program).numbers(shapes)
    both = [
        pair
        for region, step in zip(regions, plan.steps, strict=True)
        for pair in zip(step.writes, region.outputs, strict=True)
    ]
    return {number: numbers.layout(node.meta["val"]).nbytes for number, node in both}


#: A piece is handed the tensors that it was compiled for, by the engine alone: looking at the sizes of each again would
#: be a fiftieth of a decode step. A product that is added at once is rounded once, as in a library's matmul.
INDUCTOR = {
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",
}


@contextlib.contextmanager
def compiling(program: Program) -> Iterator[None]:
    """Compile pieces of this program: one thread at a time."""
    from torch._inductor import config

    known = {name: value for name, value in INDUCTOR.items() if name in config.get_config_copy()}
    with _lock, tracing(TracingContext(program.fake_mode)), torch.no_grad(), config.patch(known):
        yield


def planned(program: Program, regions: Sequence[Region]) -> tuple[Plan, list[Region]]:
    """Numbers for values, and one region of each kind."""
    inputs = tuple(program.placeholders())
    weights = tuple(dict.fromkeys(str(node.target) for region in regions for node in region.inputs if _is_weight(node)))
    known: dict[str | Node, int] = {name: number for number, name in enumerate((*inputs, *weights))}

    def number(node: Node) -> int:
        key = node if node.op == "call_function" else str(node.target)
        return known.setdefault(key, len(known))

    kinds: dict[str, Region] = {}
    steps = []
    for region in regions:
        kinds.setdefault(region.key, region)
        reads, writes = tuple(map(number, region.inputs)), tuple(map(number, region.outputs))
        steps.append(Step(list(kinds).index(region.key), reads, writes))
    results = tuple(number(node) for node in program.results())
    return Plan(inputs, weights, tuple(steps), results).freeing(), list(kinds.values())


def _is_weight(node: Node) -> bool:
    return node.op == "get_attr"


@dataclass(frozen=True)
class _Compiled:
    """The code of one piece; with Inductor also the graph it was made from, and its source."""

    call: Code
    text: str = ""
    source: str = ""


def _compiled(region: Region, backend: Backend) -> _Compiled:
    if backend == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return _Compiled(aot_eager(region.module, region.examples))
    return _inductor(region)


def _compiled_into(region: Region, device: torch.device, sizes: Sequence[Mapping[str, int]]) -> _Compiled:
    """A piece that computes in an arena; as Inductor does it by itself, if that fails."""
    from fxopt.inductor_arena import Wanted, in_one_arena

    try:
        with in_one_arena(Wanted(device, sizes)):
            return _inductor(region)
    except RuntimeError as error:  # Inductor's words for whatever went wrong within
        log.warning("a piece is compiled without the arena: %s", first_line(error))
        return _inductor(region)


def _inductor(region: Region) -> _Compiled:
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    texts: list[str] = []
    sources: list[str] = []

    def listen(gm: GraphModule, inputs: Any, **options: Any) -> Any:
        compiled = compile_fx_inner(gm, inputs, **options)
        texts.append(getattr(compiled, "inductor_post_grad_graph_str", ""))
        sources.append(getattr(compiled, "source_code", ""))
        return compiled

    # Without AOTAutograd's own cache ``listen`` is always called; Inductor's cache still holds the code.
    with functorch_config.patch(enable_autograd_cache=False):
        call: Any = compile_fx(region.module, region.examples, inner_compile=listen)
    return _Compiled(call, "\n".join(texts), "\n".join(sources))


def _proof(program: Program, texts: Sequence[str]) -> InPlaceProof:
    """What all the pieces do with the buffers that they write into."""
    inputs = program.placeholders()
    window = str(shape(inputs[ATTENTION_MASK])[1])
    batch = shape(inputs[key_name(0)])[0]
    found = [prove_in_place(text, program.facts, batch if isinstance(batch, int) else 1, window) for text in texts]
    return InPlaceProof(sum(one.writes for one in found), tuple(copy for one in found for copy in one.copies))


#: A statement of the generated ``call`` that runs a kernel or a library function.
_LAUNCH = re.compile(
    r"^ +(?:\w+ = )?(?:cpp_\w+\(|triton_\w+\.run\(|extern_kernels\.|torch\.ops\.(?!\w+\.\w*assert))", re.MULTILINE
)


def count_launches(code: str) -> int:
    """How many kernels the code that Inductor generated starts in one run."""
    return len(_LAUNCH.findall(code))
