"""How the graphs of one model become code: by which backend, in how many pieces, and in which memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxopt.activation_dag import activation_dag, dump
from fxopt.activation_plan import plan_activations
from fxopt.arena_memory import SharedArena
from fxopt.chain import Chain, Code, Plan
from fxopt.engine import Limits
from fxopt.errors import InvalidRequestError, LoweringError, first_line
from fxopt.lower import Backend, ChainMaker, Lowered, lower
from fxopt.outcome import Outcome, Spot
from fxopt.passes.plan_memory import PlanMemory
from fxopt.program import Facts, Program
from fxopt.rewrite import Pass
from fxopt.row_streams import RowStreams
from fxopt.shape_sets import ShapeSet, full_sets
from fxopt.specialise import Role
from fxopt.streamed_chain import StreamedChain
from fxopt.streaming import WeightStreams

BATCH = 2  # sequences that memory is planned for where nobody named more


class Compiler:
    """Makes specialised graphs run. With ``plan_memory`` all of them compute in one arena."""

    def __init__(
        self,
        backend: Backend,
        passes: Iterable[Pass[Any]],
        facts: Facts,
        limits: Limits,
        weight_streams: WeightStreams | None = None,
        row_streams: RowStreams | None = None,
        *,
        dumps: bool = False,
    ) -> None:
        self.backend = backend
        self._weight_streams = weight_streams  # that feed the layers, where offload_weights has moved their weights
        self._row_streams = row_streams  # of the cache that are away, where offload_kv was asked for
        self._limits = limits
        passes = tuple(passes)
        self._planned = next((one for one in passes if isinstance(one, PlanMemory)), None)
        self._dumps = dumps  # a model that is loaded must not write where its folder says
        has_arena = self._planned is not None and unplaceable(backend, facts.device) is None
        self.arena = SharedArena(facts.device) if has_arena else None

    def __call__(self, program: Program, role: Role) -> Lowered:
        sets = self._shape_sets(program, role) if self._planned is not None else ()
        if self._dumps:
            self._dump(program, role, sets)
        chain = self._streamed(role) if self._weight_streams is not None or self._row_streams is not None else None
        layered = program.facts.layered
        try:
            return lower(program, self.backend, layered=layered, arena=self.arena, shape_sets=sets, chain=chain)
        except RuntimeError as error:
            raise LoweringError(
                f"{self.backend} failed to compile the {role.name} graph for {role.sequences}: {first_line(error)} "
                'Inductor needs a C++ compiler (g++); backend="aot_eager" does without'
            ) from error

    def _streamed(self, role: Role) -> ChainMaker:
        """Makes chains whose layers find their weights, or the rows of their cache, in slots."""
        weight_streams = self._weight_streams

        def chain(plan: Plan, pieces: Sequence[Code], weights: Sequence[Tensor]) -> Chain:
            feeds = [weight_streams.feed(plan, weights, role.name)] if weight_streams is not None else []
            return StreamedChain(plan, pieces, feeds, role.name)

        return chain

    def _shape_sets(self, program: Program, role: Role) -> Sequence[ShapeSet]:
        """The sets of this graph: what was asked for, with the numbers that nobody named."""
        assert self._planned is not None
        batch = role.batch or max(self._limits.max_batch or BATCH, 2)
        asked = (self._planned.max_input_shapes or {}).get(role.name, ())
        fitting = [each for each in asked if (each.get("batch", batch) == 1) == (role.batch == 1)]
        logits = role.longest_step if role.all_logits else 1
        return full_sets(role.name, program, fitting, role.longest_step, batch, logits)

    def _dump(self, program: Program, role: Role, sets: Sequence[ShapeSet]) -> None:
        if self._planned is None or self._planned.dump_activation_dag is None:
            return
        path = Path(self._planned.dump_activation_dag)
        batch = "" if role.batch == 1 else f"-{role.batch or 'any'}"
        try:
            made = activation_dag(program.gm, plan_activations(program, sets))
            dump(made, path.with_name(f"{path.stem}.{role.name}{batch}{path.suffix}"))
        except OSError as error:
            raise InvalidRequestError(f"dump_activation_dag={str(path)!r} cannot be written: {error}") from error


def unplaceable(backend: str, device: torch.device) -> str | None:
    """Why ``plan_memory`` can place nothing, or None."""
    if backend != "inductor":
        return f"it places what Inductor's code computes, and backend={backend!r} makes none"
    if device.type == "cuda":  # they go with the buffers from thread to thread, and an arena stays in its own
        return "a decode step is recorded as a CUDA graph, and recordings do not hold on to an arena yet"
    from fxopt.inductor_arena import missing

    return missing()


def arena_outcome(rewriter: PlanMemory, why_not: str | None, graphs: Mapping[Role, Lowered]) -> Outcome:
    """What ``plan_memory`` came to: a place for every piece whose buffers it placed."""
    found = Outcome(rewriter.name, rewriter.stage.value, rewriter.summary, dropped=why_not)
    for role, graph in graphs.items():
        for number, placed in enumerate(graph.arena_use.pieces if graph.arena_use is not None else ()):
            piece = f"{role.name} for {role.sequences}, piece {number}"
            if placed is None:
                found.refused.append(Spot(piece, "", None, "Inductor placed the buffers of this piece itself"))
            else:
                found.sites.append(Spot(piece, "", None))
    found.matched, found.expected = len(found.sites), len(found.sites) + len(found.refused)
    return found
