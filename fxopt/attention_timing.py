"""Which form of attention is quickest for one query: each is compiled alone and timed on the device.

A form is written by the pass itself, into a graph that holds one call of attention. It runs as a decode step does:
recorded, over buffers of which no cache of the device holds all, in turns with the others.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.attention import Attention
from fxopt.driver import apply
from fxopt.errors import first_line
from fxopt.lower import compiling
from fxopt.passes.decode_attention import DecodeAttention, Form
from fxopt.program import Facts, Program, whole_windows
from fxopt.propagate import propagate
from fxopt.replay import Run, record_cuda
from fxopt.timed_forms import FormTime, TimedForms
from fxopt.views import shape

aten = torch.ops.aten
log = logging.getLogger("fxopt")

#: The median seconds of each call, timed in turns.
Clock = Callable[[Mapping[str, Run]], Mapping[str, float]]

ROUNDS, REPEATS = 15, 5
MOST_LAYERS = 32  # buffers that a run goes through
#: How far a form may lie from the library's, as a part of the largest number: far less than a wrong one.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Kind:
    """Attention that layers have in common."""

    heads: int
    kept: int
    width: int
    value_width: int
    dtype: torch.dtype
    mask: tuple[int, torch.dtype] | None  # its heads and numbers
    scale: float | None
    grouped: bool

    @classmethod
    def of(cls, site: Attention) -> Kind:
        query, key, value = shape(site.query), shape(site.key), shape(site.value)
        mask = None if site.mask is None else (int(shape(site.mask)[1]), site.mask.meta["val"].dtype)
        dtype = site.query.meta["val"].dtype
        sizes = (int(query[1]), int(key[1]), int(query[3]), int(value[3]))
        return cls(*sizes, dtype, mask, site.scale, site.grouped)


def timed_attention(
    program: Program, forms: Sequence[Form], batch: int, clock: Clock | None = None
) -> TimedForms | None:
    """Time the forms for all layers of a graph over a half-filled cache; None if it has no attention to time."""
    facts = program.facts
    sites = (Attention.of(node) for node in program.graph.nodes)
    kinds = Counter(Kind.of(site) for site in sites if site is not None and not site.is_causal)
    if not kinds:
        return None
    rows = min(facts.capacity, whole_windows(max(1, facts.max_len // 2)))
    seconds: dict[str, float] = dict.fromkeys(forms, 0.0)
    trouble: dict[str, str] = {}
    with torch.no_grad():
        for kind, layers in kinds.items():
            trial = Trial(kind, facts, batch, rows)
            runs = dict[str, Run]()
            for form in forms:
                try:
                    runs[form] = trial.run(form)
                except Exception as error:  # whatever a compiler or a device says: there are other forms
                    trouble[form] = first_line(error)
                    log.warning("decode attention in the form %r cannot be timed: %s", form, trouble[form])
            for name, value in (clock or on_cuda)(runs).items():
                seconds[name] += value / trial.layers * layers
    times = [FormTime(one, None if one in trouble else seconds[one], trouble.get(one, "")) for one in forms]
    return TimedForms(f"batch {batch}, {rows} rows, {sum(kinds.values())} layers", tuple(times))


class Trial:
    """One kind of attention over several layers' buffers."""

    def __init__(self, kind: Kind, facts: Facts, batch: int, rows: int) -> None:
        self._kind, self._facts, self._batch, self._rows = kind, facts, batch, rows
        self._held = min(facts.capacity, 2 * rows)  # rows are a window of a longer buffer
        self.layers = _layers(
            facts.device, batch * kind.kept * rows * (kind.width + kind.value_width) * kind.dtype.itemsize
        )
        random = torch.Generator(facts.device).manual_seed(0)
        self._inputs = [self._tensors(random) for _ in range(self.layers)]
        self._expected: Tensor | None = None  # what the first form says of the last layer

    def run(self, form: Form) -> Run:
        """The attention of all layers in this form. It has run once, and said what the first form says."""
        code = self._code(form)
        made = code(*self._inputs[-1])[0].float()
        if self._expected is None:
            self._expected = made
        error = float((made - self._expected).abs().max() / self._expected.abs().max())
        if not error <= ALLOWED.get(self._kind.dtype, 1e-3):
            raise ValueError(f"its result is {error:.1e} of the largest number away from the library's")

        def run() -> Tensor:
            results = [code(*inputs)[0] for inputs in self._inputs]
            last: Tensor = results[-1]
            return last

        return run

    def _code(self, form: Form) -> Callable[..., Any]:
        program, outcome = apply(DecodeAttention(form), self._program())
        if form != "library" and not outcome.matched:
            raise ValueError(outcome.refused[0].reason)
        if self._facts.backend != "inductor":
            return program.gm
        from torch._inductor.compile_fx import compile_fx

        examples = [node.meta["val"] for node in program.placeholders().values()]
        with compiling(program):
            code: Any = compile_fx(program.gm, examples)
        return code  # type: ignore[no-any-return]

    def _program(self) -> Program:
        """A graph with the call alone."""
        kind, graph = self._kind, Graph()
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
        nodes = []
        for name, tensor in zip(("query", "key", "value", "mask"), self._inputs[0], strict=False):
            node = graph.placeholder(name)
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            nodes.append(node)
        options: dict[str, Any] = {"scale": kind.scale, "enable_gqa": kind.grouped}
        call = graph.call_function(aten.scaled_dot_product_attention.default, tuple(nodes), options)
        graph.output((call,))
        program = Program(GraphModule({}, graph), self._facts, mode)
        known = {node: node.meta["val"] for node in nodes}
        propagate(program, known)
        return program

    def _tensors(self, random: torch.Generator) -> list[Tensor]:
        kind, device = self._kind, self._facts.device

        def made(heads: int, rows: int, width: int) -> Tensor:
            return torch.randn((self._batch, heads, rows, width), generator=random, dtype=kind.dtype, device=device)

        query = made(kind.heads, 1, kind.width)
        key, value = (made(kind.kept, self._held, width) for width in (kind.width, kind.value_width))
        tensors = [query, key[:, :, : self._rows], value[:, :, : self._rows]]
        if kind.mask is not None:
            heads, dtype = kind.mask
            everything = torch.ones if dtype is torch.bool else torch.zeros
            tensors.append(everything(self._batch, heads, 1, self._rows, dtype=dtype, device=device))
        return tensors


def _layers(device: torch.device, nbytes: int) -> int:
    """Buffers that together are twice what the device's own cache holds."""
    if device.type != "cuda":
        return 2
    cached = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, min(MOST_LAYERS, -(-2 * cached // nbytes)))


def on_cuda(runs: Mapping[str, Run]) -> Mapping[str, float]:
    """Each run recorded, and its recording replayed in turns with the others."""
    replays = {form: record_cuda(run) for form, run in runs.items()}
    taken: dict[str, list[float]] = {form: [] for form in runs}
    for _ in range(ROUNDS):
        for form, replay in replays.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPEATS):
                replay()
            end.record()
            end.synchronize()
            taken[form].append(start.elapsed_time(end) / 1000 / REPEATS)
    return {form: statistics.median(seconds) for form, seconds in taken.items()}
