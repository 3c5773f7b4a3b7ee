"""Graphs that run in one arena: as small as it can be, equal to the last bit, and never corrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from planned_models import CHUNK, MAX_LEN, inputs_of, rewritten, specialised
from torch import Tensor
from traced import branching, layouts, traced

from fxopt.activation_plan import ActivationPlan, plan_activations, plan_graph
from fxopt.arena import ArenaModule
from fxopt.arena_memory import Arena
from fxopt.chain import Chain
from fxopt.engine import Engine, Limits
from fxopt.errors import InvalidRequestError
from fxopt.families import tiny
from fxopt.judge import Judge
from fxopt.lower import Lowered
from fxopt.lower import planned as numbered
from fxopt.out_variants import out_overload
from fxopt.outline import outline
from fxopt.program import Program
from fxopt.shadow import shadow_replay
from fxopt.shape_sets import ShapeSet, default_shape_sets
from fxopt.specialise import Role

aten = torch.ops.aten
FAMILIES = ("llama", "gemma2", "mixtral")


def plan_of(program: Program, sets: Sequence[ShapeSet] | None = None) -> ActivationPlan:
    return plan_activations(program, default_shape_sets(program, CHUNK) if sets is None else sets)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arena_is_as_small_as_can_be(family: str) -> None:
    prefill, decode = (plan_of(specialised(family, role, 1)) for role in ("prefill", "decode"))
    for one in (*prefill.memory.plans, *decode.memory.plans):
        assert one.status == "optimal"
        assert one.size <= 1.001 * one.lower_bound
    together = max(prefill.memory.arena, decode.memory.arena)
    assert together <= 1.01 * max(prefill.memory.lower_bound, decode.memory.lower_bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_computes_what_it_computes_with_memory_of_its_own(family: str) -> None:
    """Two graphs and their shape sets in turn, in one arena that is full of NaN before each run."""
    arena = Arena()
    modules = []
    for role in ("prefill", "decode"):
        program = specialised(family, role, 1)
        sets = default_shape_sets(program, CHUNK)[:2]
        modules.append((program, ArenaModule(program.gm, plan_of(program, sets), arena=arena), sets))
    kept: list[tuple[Tensor, Tensor]] = []
    for turn in range(2):
        for place in range(2):
            for program, module, sets in modules:
                inputs = inputs_of(program, sets[place], seed=turn)
                stock = program.gm(*[tensor.clone() for tensor in inputs])
                arena.poison()
                replay = shadow_replay(module, inputs)
                assert replay.differences == ()
                assert replay.compared > 100
                torch.testing.assert_close(replay.results[0], stock[0])
                kept.append((replay.results[0], stock[0]))
    for logits, stock_logits in kept:  # those of earlier calls, after all the later ones
        torch.testing.assert_close(logits, stock_logits)
    assert all(module.stats["shapes planned late"] == 0 for _, module, _ in modules)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_engine_on_arenas_says_what_the_stock_model_says(family: str) -> None:
    arena = Arena()

    def source(role: Role) -> Lowered:
        program = rewritten(family).specialised(role)
        (piece,) = outline(program, layered=False)
        numbers, _ = numbered(program, [piece])
        sets = default_shape_sets(program, 16, batch=2)
        module = ArenaModule(piece.module, plan_activations(program, sets, module=piece.module), arena=arena)
        weights = tuple(program.weight(name) for name in numbers.weights)
        return Lowered(lambda: program, Chain(numbers, [module]), numbers, weights, windowed=True)

    engine = Engine(rewritten(family).program.facts, source, Limits(chunk=16, max_batch=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the default shape sets are large enough
        _, complaint = Judge(tiny(family), MAX_LEN).engine(engine, batch=2)
    assert complaint is None


def test_shapes_beyond_the_plan_grow_the_arena_once_and_say_so() -> None:
    program = specialised("llama", "prefill", 1)
    module = ArenaModule(program.gm, plan_of(program, [{"step": 8, "window": 64}]))
    planned_bytes = module.arena.nbytes
    first = inputs_of(program, {"step": 8, "window": 64})
    kept, wanted = module(*first)[0], program.gm(*first)[0]
    large = inputs_of(program, {"step": 64, "window": 128})
    with pytest.warns(
        UserWarning, match=rf"needs an arena of [\d,]+ bytes, but {planned_bytes:,} were planned"
    ) as told:
        results = module(*large)
    assert len(told) == 1
    torch.testing.assert_close(results[0], program.gm(*large)[0])
    assert module.arena.nbytes > planned_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(*inputs_of(program, {"step": 96, "window": 192}))
        module.arena.poison()
        assert shadow_replay(module, first).differences == ()
    torch.testing.assert_close(kept, wanted)
    assert module.stats["arena grown"] == 2
    assert module.stats["shapes planned late"] == 2


def test_unplanned_shapes_that_fit_take_no_new_memory() -> None:
    program = specialised("llama", "decode", 1)
    module = ArenaModule(program.gm, plan_of(program, [{"window": 256}]))
    before = module.arena.nbytes
    inputs = inputs_of(program, {"window": 128})
    torch.testing.assert_close(module(*inputs)[0], program.gm(*inputs)[0])
    assert (module.arena.nbytes, module.stats["arena grown"], module.stats["shapes planned late"]) == (before, 0, 1)


def test_debug_mode_needs_no_arena() -> None:
    program = specialised("llama", "decode", 1)
    module = ArenaModule(program.gm, plan_of(program), mode="debug")
    inputs = inputs_of(program, {"window": 64})
    torch.testing.assert_close(module(*inputs)[0], program.gm(*inputs)[0])
    assert module.arena.nbytes == 0


def test_an_unknown_mode_is_refused() -> None:
    program = specialised("llama", "decode", 1)
    with pytest.raises(InvalidRequestError, match="mode='fast' was asked for; there are inference and debug"):
        ArenaModule(program.gm, plan_of(program), mode="fast")  # type: ignore[arg-type]


def test_a_plan_in_which_two_live_values_overlap_shows_at_the_op_that_reads_the_wrong_one() -> None:
    def product(x: Tensor, y: Tensor) -> Any:
        return aten.matmul.default(aten.cat.default([x, x]), aten.cat.default([y, y], 1))

    gm, x, y = traced(product), torch.randn(4, 8), torch.randn(8, 4)
    right = plan_graph(gm, [layouts(x, y)])
    (one,) = right.memory.plans
    wrong = replace(one, offsets=dict.fromkeys(one.offsets, 0))
    replay = shadow_replay(ArenaModule(gm, replace(right, memory=replace(right.memory, plans=(wrong,)))), [x, y])
    assert [difference.node for difference in replay.differences] == ["matmul_default"]


def test_nan_left_in_the_arena_is_seen_by_whoever_reads_it() -> None:
    def reads_room(x: Tensor) -> Any:
        return aten.add.Tensor(x, aten.empty_like.default(x))

    gm, x = traced(reads_room), torch.randn(4, 8)
    module = ArenaModule(gm, plan_graph(gm, [layouts(x)]))
    module.arena.poison()
    assert module(x).isnan().all()


def _tuples(x: Tensor) -> Any:
    values, places = aten.topk.default(x, 2), aten.sort.default(x)
    parts = aten.split.Tensor(aten.neg.default(x), 4, 1)
    return aten.neg.default(values[0]), aten.add.Tensor(places[1], 1), aten.mul.Tensor(parts[0], parts[1])


def _writes(x: Tensor) -> Any:
    room = aten.empty_like.default(x)
    rows = aten.arange.default(4)
    filled = aten.index_put_.default(room, [rows], aten.neg.default(x))
    return aten.add.Tensor(aten.div_.Tensor(filled, aten.exp.default(x)), 1.0)


def _copies(x: Tensor) -> Any:
    turned = aten.reshape.default(aten.transpose.int(x, 0, 1), [4, 8])
    flipped = aten.flip.default(turned, [0, -1])
    wide = aten.to.dtype(flipped, torch.float64)
    return aten.sum.dim_IntList(aten.mul.Tensor(wide, aten.full_like.default(wide, 2.0)), [0])


def _own_memory(x: Tensor) -> Any:
    low = aten.relu.default(aten.sub.Tensor(x, 0.5))  # its out= was generated
    return aten.neg.default(aten.layer_norm.default(low, [8]))


def _empty(x: Tensor) -> Any:
    nothing = aten.slice.Tensor(x, 0, 0, 0)
    return aten.cat.default([aten.neg.default(nothing), aten.neg.default(x)])


def _dead(x: Tensor) -> Any:
    aten.exp.default(x)
    return aten.neg.default(aten.cat.default([x, x]))


@pytest.mark.parametrize("function", [_tuples, _writes, _copies, _own_memory, _empty, _dead])
def test_small_graphs(function: Callable[..., Any]) -> None:
    gm, x = traced(function), torch.randn(4, 8)
    module = ArenaModule(gm, plan_graph(gm, [layouts(x)]))
    module.arena.poison()
    replay = shadow_replay(module, [x])
    assert replay.differences == ()
    torch.testing.assert_close(module(x), gm(x), rtol=0, atol=0)
    assert bool([event for event in module.stats if event.startswith("own memory")]) == (function is _own_memory)


@pytest.mark.parametrize("pred", [True, False])
def test_control_flow_runs_as_it_is_and_its_result_is_copied_in(pred: bool) -> None:
    gm, inputs = branching(), [torch.tensor(pred), torch.randn(4, 8)]
    module = ArenaModule(gm, plan_graph(gm, [layouts(*inputs)]))
    module.arena.poison()
    replay = shadow_replay(module, inputs)
    assert replay.differences == ()
    torch.testing.assert_close(replay.results[0], inputs[1], rtol=0, atol=0)
    assert module.stats["own memory: cond"] == 1


@pytest.mark.parametrize(
    ("op", "found"),
    [
        (aten.eq.Tensor, aten.eq.Tensor_out),
        (aten.eq.Scalar, aten.eq.Scalar_out),
        (aten.pow.Tensor_Scalar, aten.pow.Tensor_Scalar_out),
        (aten.__and__.Tensor, aten.bitwise_and.Tensor_out),
        (aten.sum.dim_IntList, aten.sum.IntList_out),
        (aten.arange.default, aten.arange.out),
        (aten.topk.default, aten.topk.values),
        (aten.relu.default, None),  # generated: makes a result of its own and copies it
        (aten.layer_norm.default, None),
    ],
)
def test_out_overloads_are_found_by_all_their_types(op: object, found: object) -> None:
    assert out_overload(op) is found  # type: ignore[arg-type]


@pytest.mark.cuda
def test_on_cuda() -> None:
    def chain(x: Tensor) -> Any:
        return aten.sum.dim_IntList(aten.softmax.int(aten.neg.default(aten.cat.default([x, x])), -1), [0])

    gm, x = traced(chain), torch.randn(4, 8, device="cuda")
    module = ArenaModule(gm, plan_graph(gm, [layouts(x)]))
    assert module.arena.device.type == "cuda"
    assert shadow_replay(module, [x]).differences == ()
