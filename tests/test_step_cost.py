"""The cost of a step: by hand on small graphs, and beside what the profiler sees on real ones."""

from __future__ import annotations

import operator
import time
from functools import cache
from typing import Any

import pytest
import torch
from measured import compiled_launches, run_as_it_stands, step_of_engine
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.fx import GraphModule

import fxopt
from fxopt.capture import capture
from fxopt.demo_model import load_model
from fxopt.driver import apply
from fxopt.errors import InvalidRequestError
from fxopt.families import tiny
from fxopt.passes import DEFAULT_PASSES
from fxopt.program import Program
from fxopt.rewrite import Stage
from fxopt.specialise import Role, specialise
from fxopt.step_cost import StepCost, step_cost
from fxopt.weights import pack

aten = torch.ops.aten
BACKENDS = ("eager", "inductor")
CAPACITY, CONTEXT, WINDOW = 128, 40, 64
LAYERS, HEADS, KEPT_HEADS, WIDTH, FLOAT = 2, 4, 2, 16, 4  # of the tiny llama
ROW = 2 * LAYERS * KEPT_HEADS * WIDTH * FLOAT  # what the cache keeps of one token


@cache
def stages(backend: str, family: str = "llama", required_alone: bool = False) -> dict[str, Program]:
    """The graph after every pass, by the name of the pass."""
    program = capture(tiny(family), max_len=100, capacity=CAPACITY, backend=backend)
    found = {"capture": program}
    for kind in DEFAULT_PASSES:
        if required_alone and not kind.required:
            continue
        if kind.stage is Stage.DECODE and "specialised" not in found:
            program = found["specialised"] = specialise(program, Role("decode", 1, longest_step=1))
        program, _ = apply(kind(), program)
        found[kind.name] = program
    return found


def cost(backend: str, after: str) -> StepCost:
    return step_cost(stages(backend)[after], context=CONTEXT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_growing_cache_is_read_and_written_whole(backend: str) -> None:
    captured = cost(backend, "capture")
    assert captured.kv_written_bytes == CONTEXT * ROW
    assert captured.kv_read_bytes == (CONTEXT - 1) * ROW + CONTEXT * ROW  # by cat, then by the expansion of heads


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_take_one_row_and_a_window_halves_what_is_read(backend: str) -> None:
    assert cost(backend, "static_kv").kv_written_bytes == ROW
    assert cost(backend, "static_kv").kv_read_bytes == CAPACITY * ROW
    assert cost(backend, "window_kv").kv_read_bytes == WINDOW * ROW
    assert cost(backend, DEFAULT_PASSES[-1].name).kv_read_bytes == WINDOW * ROW


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("after", ["capture", "static_kv", "fuse_qkv", "specialised"])
def test_every_weight_is_read_once_and_the_embedding_by_one_row(backend: str, after: str) -> None:
    model: Any = tiny("llama")
    table = model.get_input_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters()) - table.nbytes + table[0].nbytes
    assert cost(backend, after).weight_bytes == weights + model.model.rotary_emb.inv_freq.nbytes


def test_copies_of_the_captured_form_are_its_cats_and_expansions() -> None:
    angles = WIDTH * FLOAT
    halves = LAYERS * (HEADS + KEPT_HEADS) * WIDTH * FLOAT
    expansions = CONTEXT * ROW * HEADS // KEPT_HEADS
    of_the_cache = CONTEXT * ROW + expansions
    assert cost("eager", "capture").copied_bytes == of_the_cache + angles + halves
    assert of_the_cache <= cost("inductor", "capture").copied_bytes < of_the_cache + angles + halves


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_attention_removes_the_copies_of_the_cache(backend: str) -> None:
    before, after = cost(backend, "static_kv"), cost(backend, "grouped_attention")
    assert before.copied_bytes - after.copied_bytes == CAPACITY * ROW * HEADS // KEPT_HEADS
    assert after.copied_bytes < ROW * HEADS


def test_joined_projections_save_two_launches_in_each_layer() -> None:
    assert cost("eager", "window_kv").launches - cost("eager", "fuse_qkv").launches == 2 * LAYERS
    assert cost("inductor", "window_kv").launches - cost("inductor", "fuse_qkv").launches >= 2 * LAYERS
    assert cost("eager", "fuse_qkv").copied_bytes == cost("eager", "window_kv").copied_bytes


def test_all_passes_make_one_launch_that_reads_weights_and_cache_and_little_else() -> None:
    final = cost("inductor", DEFAULT_PASSES[-1].name)
    assert final.launches == 1
    assert final.copied_bytes == 0
    assert final.moved_bytes < 1.01 * (final.weight_bytes + final.kv_read_bytes + final.kv_written_bytes)
    logits = 128 * FLOAT
    assert final.peak_bytes == logits


@pytest.mark.pinned
def test_decode_passes_do_the_same_arithmetic() -> None:
    before, after = cost("inductor", "specialised"), cost("inductor", DEFAULT_PASSES[-1].name)
    assert after.flops == pytest.approx(before.flops, rel=0.02)


#: Launches of the compiled graph by ``measured.compiled_launches``: without optional passes, without those for decode
#: graphs, and with all.
COMPILED = {"llama": (30, 20, 1), "gemma2": (29, 25, 9), "mixtral": (44, 36, 13)}


@pytest.mark.pinned
@pytest.mark.parametrize("family", COMPILED)
def test_loops_are_joined_as_inductor_was_seen_to_join_them(family: str) -> None:
    minimal = specialise(stages("inductor", family, required_alone=True)["static_kv"], Role("decode", 1, 1))
    programs = (minimal, stages("inductor", family)["specialised"], stages("inductor", family)[DEFAULT_PASSES[-1].name])
    assert tuple(step_cost(program, context=CONTEXT).launches for program in programs) == COMPILED[family]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_specialised_graph_costs_what_the_symbolic_one_does(backend: str) -> None:
    assert cost(backend, "specialised") == cost(backend, "last_logits")


def test_a_batch_reads_the_weights_once() -> None:
    one, three = (step_cost(stages("eager")["last_logits"], batch=batch, context=CONTEXT) for batch in (1, 3))
    assert three.launches == one.launches
    assert three.kv_read_bytes == 3 * one.kv_read_bytes
    rows = 2 * 64 * FLOAT  # two more of the embedding
    assert three.weight_bytes == one.weight_bytes + rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_op_that_cannot_be_looked_into_is_one_launch(backend: str) -> None:
    program = stages(backend)["specialised"].copy()
    silu = next(node for node in program.graph.nodes if node.target is aten.silu.default)
    with torch.library._scoped_library("step_cost_test", "FRAGMENT") as library:
        library.define("opaque(Tensor x) -> Tensor")  # no fake kernel, so running it on fakes fails
        silu.target = torch.ops.step_cost_test.opaque.default
        odd, plain = step_cost(program, context=CONTEXT), cost(backend, "specialised")
    assert odd.flops < plain.flops
    assert odd.moved_bytes >= plain.moved_bytes
    assert odd.launches >= plain.launches


def test_the_body_of_a_wrapper_costs_what_it_costs_inline() -> None:
    class Body(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (aten.silu.default(x),)

    program = stages("eager")["specialised"].copy()
    program.gm.add_module("body", torch.fx.symbolic_trace(Body()))
    silu = next(node for node in program.graph.nodes if node.target is aten.silu.default)
    with program.graph.inserting_before(silu):
        body = program.graph.get_attr("body")
        arguments = (False, body, *silu.args)
        wrapped = program.graph.call_function(torch.ops.higher_order.wrap_with_set_grad_enabled, arguments)
        item = program.graph.call_function(operator.getitem, (wrapped, 0))
    silu.replace_all_uses_with(item)
    program.graph.erase_node(silu)
    assert isinstance(program.gm.body, GraphModule)
    assert step_cost(program, context=CONTEXT) == cost("eager", "specialised")


@pytest.mark.parametrize(("batch", "context"), [(2, CONTEXT), (1, 0), (1, CAPACITY + 1)])
def test_what_a_graph_cannot_serve_is_refused(batch: int, context: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"batch={batch}|context={context}"):
        step_cost(stages("eager")["specialised"], batch=batch, context=context)


@pytest.mark.pinned
@pytest.mark.parametrize("batch", [1, 3])
def test_every_graph_of_the_pipeline_runs_as_counted(batch: int) -> None:
    for name, program in stages("eager").items():
        if name == "specialised":
            break
        packed = pack(program)
        found, seen = step_cost(packed, batch=batch, context=CONTEXT), run_as_it_stands(packed, CONTEXT, batch)
        assert found.launches == len(seen.launches), name
        assert found.moved_bytes == pytest.approx(seen.moved_bytes, rel=0.02), name
        grown = found.kv_written_bytes if name in ("capture", "remove_control_flow") else 0  # is no activation
        assert found.peak_bytes + grown == pytest.approx(seen.peak_bytes, rel=0.02), name


@pytest.mark.pinned
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "mixtral"])
def test_a_step_of_the_engine_runs_as_counted(family: str) -> None:
    """Off by bytes alone: the profiler leaves out the indices of ``index``, and notes Python's numbers as tensors."""
    fast: Any = fxopt.optimize(tiny(family), max_len=256, backend="eager", verify="off")
    agree(fast, context=CONTEXT)
    agree(fast, context=200)


def agree(fast: Any, context: int) -> None:
    engine = fast.fxopt.engine
    found = step_cost(engine.lowered(engine.decode_role(1)).program, context=context)
    seen = step_of_engine(fast, context)
    assert found.launches == len(seen.launches)
    assert found.moved_bytes == pytest.approx(seen.moved_bytes, rel=0.02)
    assert found.peak_bytes == pytest.approx(seen.peak_bytes, rel=0.02)


@pytest.mark.slow
def test_smollm2_runs_as_counted_and_is_counted_at_once() -> None:
    model, _ = load_model("demo", torch.float32)
    fast: Any = fxopt.optimize(model, max_len=256, backend="eager", verify="off")
    agree(fast, context=100)
    program = fast.fxopt.symbolic
    started = time.process_time()
    for _ in range(3):
        step_cost(program, context=100)
    assert (time.process_time() - started) / 3 < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("passes", [None, {"decode_attention": False, "matvec": False}, "minimal"])
def test_compiled_smollm2_launches_what_was_counted(passes: Any) -> None:
    """Kernels of Inductor are noted one by one, library calls as the ops that they are."""
    torch._dynamo.reset()
    model, _ = load_model("demo", torch.float32)
    if passes is not None:
        model.model.layers = model.model.layers[:6]
        model.config.num_hidden_layers = 6
    with inductor_config.patch({"cpp.enable_kernel_profile": True}):
        fast: Any = fxopt.optimize(model, max_len=256, passes=passes, verify="off")
    engine = fast.fxopt.engine
    found = step_cost(engine.lowered(engine.decode_role(1)).program, context=100)
    assert found.launches == pytest.approx(len(compiled_launches(fast, 100)), rel=0.05)
