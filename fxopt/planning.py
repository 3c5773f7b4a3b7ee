"""``plan_model``: how much memory the activations of a model need, and where they lie. From its config alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from fxopt.activation_plan import plan_activations
from fxopt.admission import Selection
from fxopt.errors import InvalidRequestError
from fxopt.memory.planner import BUDGET_S, Solver
from fxopt.memory.sets import Merge
from fxopt.model_plan import GraphPlan, ModelPlan
from fxopt.shape_sets import ShapeSet, full_sets, sets_by_graph
from fxopt.specialise import Role
from fxopt.weightless import ModelSource, rewritten, uncollected

#: The graphs that can be planned, and the tokens that each takes at once: any number up to a chunk, or one.
GRAPHS = {"prefill": 256, "decode": 1}


def plan_model(
    model: ModelSource,
    max_len: int | None = None,
    *,
    shapes: Mapping[str, Sequence[ShapeSet]] | None = None,
    batch: int = 1,
    merge: Merge = "tables",
    passes: Selection = None,
    dtype: torch.dtype | None = None,
    solver: Solver = "auto",
    budget_s: float = BUDGET_S,
) -> ModelPlan:
    """Plan the activations of the prefill and the decode graph, as they run operator by operator.

    ``shapes`` names graphs, and sets of shapes for each: ``{"prefill": [{"step": 128}], "decode": []}``. What a
    set leaves out is as in the largest of the usual sets, which a graph without sets has. ``budget_s`` is for
    each graph.
    """
    asked = _asked(shapes)
    sequences = {name: _sequences(name, sets, batch) for name, sets in asked.items()}
    with uncollected():
        # "eager", since passes for Inductor write out what only its loops make cheap.
        made = rewritten(model, max_len, passes, dtype=dtype, backend="eager", batch=max(sequences.values()))
        with made.progress.step("specialise"):
            programs = {
                name: made.specialised(Role(name, 1 if count == 1 else None, GRAPHS[name]))
                for name, count in sequences.items()
            }
    sets = {
        name: full_sets(name, program, asked[name], GRAPHS["prefill"], sequences[name])
        for name, program in programs.items()
    }
    graphs = []
    for name, program in programs.items():
        started = time.perf_counter()
        with made.progress.step(f"plan {name}"):
            plan = plan_activations(program, sets[name], merge=merge, solver=solver, budget_s=budget_s)
        graphs.append(GraphPlan(name, program, sets[name], plan, time.perf_counter() - started))
    facts = made.pipeline.captured.facts
    return ModelPlan(made.model, facts.max_len, str(facts.dtype).removeprefix("torch."), merge, tuple(graphs))


def _asked(shapes: Mapping[str, Sequence[ShapeSet]] | None) -> dict[str, Sequence[ShapeSet]]:
    """The sets of each graph that is to be planned."""
    if shapes is None:
        return {name: () for name in GRAPHS}
    found = sets_by_graph(shapes, tuple(GRAPHS))
    if not found:
        raise InvalidRequestError(f"there is no graph to plan in shapes; name {' or '.join(GRAPHS)}")
    return {name: found[name] for name in GRAPHS if name in found}


def _sequences(graph: str, asked: Sequence[ShapeSet], batch: int) -> int:
    """The most sequences that a graph is asked for. One sequence has a graph of its own."""
    counts = [each.get("batch", batch) for each in asked] or [batch]
    if wrong := [count for count in counts if type(count) is not int or count < 1]:
        raise InvalidRequestError(f"{graph}: batch={wrong[0]!r} is no size; give a whole number from 1")
    if 1 in counts and max(counts) > 1:
        raise InvalidRequestError(
            f"{graph}: batch=1 and batch={max(counts)} were asked for, and one sequence has a graph of its own; "
            "plan it apart from the others"
        )
    return max(counts)
