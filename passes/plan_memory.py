"""What compiled code computes lies in one arena, planned beforehand.

    buf3 = empty_strided(…)      becomes      arena = fxopt_room(bytes)
                                              buf3 = alloc_from_pool(arena, offset, …)

All compiled graphs of a model share the arena, prefill and decode and every layer, since they never
run at the same time; a thread has its own. Nothing in a graph changes: the compiler is asked to
place its buffers where the plan says. It costs no time and saves none on a CPU. What it gives is a
bound that is known beforehand, and fewer allocations: what one piece hands to the next, and the
results that libraries make for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fxopt.errors import InvalidRequestError
from fxopt.rewrite import Pass, Stage
from fxopt.shape_sets import sets_by_graph

GRAPHS = ("prefill", "decode", "verify", "score")  # that a model runs as


@dataclass(frozen=True)
class PlanMemory(Pass[Any]):
    name = "plan_memory"
    summary = "places what compiled code computes in one planned arena"
    stage = Stage.CODE
    by_default: ClassVar[bool] = False

    #: For each graph the sizes to plan for, such as ``{"prefill": [{"step": 64, "window": 512}]}``. What a set leaves
    #: out follows from ``max_len``, ``chunk`` and ``max_batch``, as everything does for a graph without sets.
    max_input_shapes: Mapping[str, tuple[Mapping[str, int], ...]] | None = None
    #: A file for the activations of each graph and their plan, before the compiler joins operators.
    dump_activation_dag: str | None = None

    def __post_init__(self) -> None:
        if self.max_input_shapes is not None:
            object.__setattr__(self, "max_input_shapes", sets_by_graph(self.max_input_shapes, GRAPHS))
        if not isinstance(self.dump_activation_dag, str | None):
            raise InvalidRequestError(f"dump_activation_dag={self.dump_activation_dag!r} is no path of a file")
