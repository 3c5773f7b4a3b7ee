"""The pass ``plan_memory``: compiled code computes in one arena, and says the same."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._inductor.codegen import memory_planning
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

import fxopt
from fxopt import InvalidRequestError, RewriteError, inductor_arena
from fxopt.activation_dag import load
from fxopt.admission import select
from fxopt.arena_memory import SharedArena, room
from fxopt.compiler import unplaceable
from fxopt.families import tiny
from fxopt.inductor_arena import ArenaPlanner, Wanted, in_one_arena, missing
from fxopt.memory import SymbolicBuffer, SymbolicProblem, plan_symbolic
from fxopt.memory.checker import verify
from fxopt.memory.problem import ALIGN, rounded
from fxopt.offset_lines import OffsetLines, offset_lines
from fxopt.placement import PlacedBuffer, Placement, placement

PROMPT = torch.arange(3, 43)[None]
NEW = 12


def _tokens(model: Any, batch: int = 1, start: int = 0) -> Tensor:
    found: Tensor = model.generate(PROMPT[:, start:].repeat(batch, 1), max_new_tokens=NEW, do_sample=False)
    return found


def _planned(family: str = "llama", **options: Any) -> Any:
    options = {"max_len": 64, "chunk": 16, "passes": {"plan_memory": True}, "verify": "off", **options}
    return fxopt.optimize(tiny(family, layers=3), **options)


@pytest.fixture(scope="module")
def planned() -> Any:
    return _planned(compile="layer")


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compile, whatever is in the cache."""
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of code finds NaN wherever it does not write itself."""
    honest = SharedArena.room

    def spoilt(arena: SharedArena, nbytes: int) -> Tensor:
        return honest(arena, nbytes).fill_(0xFF)

    monkeypatch.setattr(SharedArena, "room", spoilt)


# What it is


def test_it_is_applied_only_where_somebody_asks() -> None:
    names = [one.name for one in select(None)]
    assert "plan_memory" not in names
    assert "plan_memory" not in [one.name for one in select("default")]
    assert [one.name for one in select({"plan_memory": True})] == [*names, "plan_memory"]
    assert [one.name for one in select({"plan_memory": False})] == names
    assert select({"plan_memory": {"dump_activation_dag": "here.yaml"}})[-1].dump_activation_dag == "here.yaml"  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "compile"), [("llama", "whole"), ("gemma2", "layer"), ("mixtral", "layer"), ("gpt2", "whole")]
)
def test_tokens_arena_and_report(family: str, compile: Any, poisoned: None) -> None:
    fast = _planned(family, compile=compile, verify="final", max_batch=2)
    report = fast.fxopt.report
    assert report["plan_memory"].matched == report["plan_memory"].expected >= 4  # pieces of four graphs
    for use in report.arenas.values():
        assert use.arena == use.lower_bound > 0
        for piece in use.placed:
            piece.plan.verify()
    assert "one arena" in str(report)
    assert "1.000 of the least" in str(report)
    for batch in (1, 2):
        stock = _tokens(tiny(family, layers=3), batch)
        for _ in range(2):  # nothing grows, neither at first nor again
            assert torch.equal(_tokens(fast, batch), stock)
    assert fast.fxopt.stats["arena grown"] == 0
    assert fast.fxopt.arena_bytes == max(use.arena for use in report.arenas.values())
    assert fast.fxopt.release() > fast.fxopt.arena_bytes == 0


def test_every_piece_is_placed(planned: Any, poisoned: None) -> None:
    outcome = planned.fxopt.report["plan_memory"]
    assert (outcome.matched, outcome.refused) == (6, [])  # of two graphs the first piece, one for the layers, the last
    prefill = planned.fxopt.report.arenas["prefill for 1 sequence"]
    assert prefill.runs == (1, 3, 1)
    layer = prefill.placed[1]
    assert all(one.layer == 0 and one.source.startswith("modeling_llama.py:") for one in layer.buffers)
    assert "float32 [1, 16, 64]" in {one.shape for one in layer.buffers}
    assert prefill.handed_on >= 2 * 16 * 64 * 4  # a hidden state comes in, and another goes out
    assert torch.equal(_tokens(planned), _tokens(tiny("llama", layers=3)))


def test_nothing_is_allocated_that_could_be_placed(planned: Any) -> None:
    """In a layer only what it hands on and what attention makes for itself are new memory."""
    counts = []
    for fast in (planned, _planned(compile="layer", passes=None)):
        cache = fast(PROMPT[:, :16]).past_key_values
        with torch.profiler.profile(profile_memory=True) as recorded:
            fast(PROMPT[:, 16:32], past_key_values=cache, logits_to_keep=1)
        events = recorded.profiler.kineto_results.events()
        counts.append(sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events))
    assert counts[0] <= counts[1] - 3 * 5


def test_code_from_the_cache_says_what_it_was_planned_as(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unasked(*_: Any) -> Any:
        raise AssertionError("the piece was compiled again")

    monkeypatch.setattr(inductor_arena, "_planned", unasked)
    again = _planned(compile="layer")
    assert again.fxopt.report.arenas == planned.fxopt.report.arenas
    assert torch.equal(_tokens(again), _tokens(planned))


def test_the_page_draws_every_piece(planned: Any, tmp_path: Any, other_versions: str) -> None:
    planned.fxopt.report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    drawn = [piece for use in planned.fxopt.report.arenas.values() for piece in use.placed if piece.arena]
    assert page.count('class="memory-plan"') == len(drawn)
    assert len(drawn) == 4 or other_versions  # what is embedded needs no arena here, in either graph
    assert "lower bound" in page
    assert "modeling_llama.py:" in page
    policy = page.split("style-src ", 1)[1].split(";", 1)[0]
    assert policy.count("sha256-") >= 2  # the styles of the pictures may be used as well


# What happens when it cannot


def test_inductor_places_what_the_planner_fails_on(
    uncached: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> Any:
        raise ArithmeticError("no plan today")

    monkeypatch.setattr(inductor_arena, "_planned", fails)
    fast = _planned(compile="layer")
    outcome = fast.fxopt.report["plan_memory"]
    assert (outcome.matched, outcome.expected) == (0, 6)
    assert "Inductor placed the buffers of this piece itself" in str(fast.fxopt.report)
    assert "a piece is compiled without the arena: ArithmeticError: no plan today" in caplog.text
    assert torch.equal(_tokens(fast), _tokens(tiny("llama", layers=3)))
    assert fast.fxopt.arena_bytes == 0
    with pytest.raises(RewriteError, match="plan_memory matched 0 of 6 places"):
        _planned(compile="layer", strict=True)


def test_code_that_computes_something_else_is_taken_back(
    uncached: None, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_at_the_bottom(planned: Any) -> OffsetLines:
        found = offset_lines(planned)
        return replace(found, offsets=dict.fromkeys(found.offsets, sympy.Integer(0)))

    monkeypatch.setattr(inductor_arena, "offset_lines", all_at_the_bottom)
    with pytest.warns(UserWarning, match="with plan_memory applied, .*goes on without it"):
        fast = _planned(compile="layer", verify="final")
    report = fast.fxopt.report
    assert report["plan_memory"].dropped
    assert report["matvec"].dropped is None
    assert report.arenas == {}
    assert fast.fxopt.arena_bytes == 0
    assert torch.equal(_tokens(fast), _tokens(tiny("llama", layers=3)))


class Views(torch.nn.Module):
    """Returns bytes of what it has computed, which Inductor takes for a value of its own."""

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a = (x @ w).sin()
        return a.view(torch.int8), (a @ w).cos() @ w


class Branches(torch.nn.Module):
    """Has a body that is code of its own, called in the middle."""

    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor]:
        a = (x @ w).sin()
        b = torch.cond(x.sum() > 0, lambda x, w: ((x @ w).exp() @ w).cos() @ w, lambda x, w: x @ w, (a, w))
        return ((a @ w).tanh() @ b,)


def _in_arena(module: torch.nn.Module, *inputs: Tensor) -> Callable[..., Any]:
    graph = torch.export.export(module, inputs).module()
    with torch.no_grad(), in_one_arena(Wanted(torch.device("cpu"), [{}])):
        return SharedArena(torch.device("cpu")).running(compile_fx(graph, list(inputs)))  # type: ignore[arg-type]


def test_what_is_returned_as_a_view_is_not_placed(uncached: None) -> None:
    x, w = torch.randn(24, 24), torch.randn(24, 24)
    code = _in_arena(Views(), x, w)
    with torch.no_grad():
        kept = code(x, w)
        copies = [tensor.clone() for tensor in kept]
        code(x + 1, w)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_code_with_bodies_of_its_own_is_not_placed(uncached: None) -> None:
    x, w = torch.randn(24, 24), torch.randn(24, 24)
    with pytest.raises(RuntimeError, match="in the arena that its caller is using"):
        _in_arena(Branches(), x, w)


def test_another_version_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.delattr(memory_planning, "BufferGroup")
    with pytest.warns(UserWarning, match="plan_memory can do nothing: Inductor has no BufferGroup"):
        fast = _planned()
    assert "no BufferGroup" in fast.fxopt.report["plan_memory"].dropped
    assert fast.fxopt.arena_bytes == 0
    monkeypatch.undo()
    monkeypatch.delattr(memory_planning.MemoryPlanner, "allocate_groups")
    assert missing() == "Inductor's MemoryPlanner has no allocate_groups in this version of PyTorch"


def test_a_backend_without_code_of_its_own() -> None:
    sentence = "it places what Inductor's code computes, and backend='aot_eager' makes none"
    with pytest.warns(UserWarning, match=sentence):
        fast = _planned(backend="aot_eager")
    assert torch.equal(_tokens(fast), _tokens(tiny("llama", layers=3)))
    with pytest.raises(RewriteError, match=f"plan_memory can do nothing: {sentence}"):
        _planned(backend="aot_eager", strict=True)


def test_others_who_compile_meanwhile_have_inductors_own_planner(uncached: None) -> None:
    sources: list[str] = []

    def compile_something() -> None:
        x = torch.ones(8, 8)
        with torch._inductor.config.patch(memory_planning=True), torch.no_grad():
            _, found = run_and_get_code(torch.compile(lambda x: (x.sin() @ x).cos() @ x), x)
        sources.extend(found)

    with in_one_arena(Wanted(torch.device("cpu"), [{}])):
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()
        assert memory_planning.MemoryPlanner is ArenaPlanner
    assert memory_planning.MemoryPlanner is not ArenaPlanner
    assert "alloc_from_pool(" in sources[0]
    assert "fxopt_room" not in sources[0]


# The arena


def test_more_than_was_planned_grows_and_is_said_once(planned: Any) -> None:
    fast = _planned(compile="layer")
    stock = tiny("llama", layers=3)
    assert torch.equal(_tokens(fast, 2), _tokens(stock, 2))  # two sequences are planned for where nobody says more
    assert fast.fxopt.stats["arena grown"] == 0
    with pytest.warns(
        UserWarning, match=r"needs an arena of [\d,]+ bytes, but [\d,]+ were planned; it grows now"
    ) as told:
        assert torch.equal(_tokens(fast, 5), _tokens(stock, 5))
    assert [warning.filename for warning in told] == [__file__]
    grown = fast.fxopt.stats["arena grown"]
    assert grown > 0
    thread = threading.Thread(target=_tokens, args=(fast, 5))  # which has its arena in that size at once
    thread.start()
    thread.join()
    assert fast.fxopt.stats["arena grown"] == grown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(_tokens(fast, 7), _tokens(stock, 7))


def test_threads_compute_in_arenas_of_their_own(planned: Any) -> None:
    stock = {start: _tokens(tiny("llama", layers=3), start=start) for start in (0, 20)}
    wrong = []

    def ask(start: int) -> None:
        for _ in range(6):
            wrong.extend([start] * (not torch.equal(_tokens(planned, start=start), stock[start])))

    threads = [threading.Thread(target=ask, args=(start,)) for start in stock]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_belongs_to_the_model_that_runs() -> None:
    one, other = SharedArena(torch.device("cpu")), SharedArena(torch.device("cpu"))
    seen: list[tuple[int, int]] = []

    def code(arena: SharedArena, then: Callable[[], Any] | None = None) -> Callable[[], Any]:
        def body() -> list[int]:
            seen.append((room(64, "cpu").data_ptr(), arena.room(64).data_ptr()))
            if then is not None:
                then()
                seen.append((room(64, "cpu").data_ptr(), arena.room(64).data_ptr()))
            return []

        return arena.running(body)

    one.reserve(128)
    other.reserve(128)
    code(one, code(other))()
    assert all(asked == own for asked, own in seen)
    assert len({own for _, own in seen}) == 2
    assert room(16, "cpu").nbytes == 16  # code that nobody runs in an arena has memory of its own
    assert one.running(lambda: [room(16, "meta")])()[0].device.type == "meta"  # and so has code for another device
    assert one.release() == 128
    assert one.nbytes == 0
    assert one.room(64).nbytes == 128


def test_shapes_that_somebody_names(planned: Any) -> None:
    shapes = {"prefill": [{"step": 8, "window": 64}, {"batch": 6}], "decode": ({"batch": 6},)}
    fast = _planned(passes={"plan_memory": {"max_input_shapes": shapes}}, compile="layer")
    wide, narrow = planned.fxopt.report.arenas, fast.fxopt.report.arenas
    assert narrow["prefill for 1 sequence"].arena < wide["prefill for 1 sequence"].arena
    assert narrow["decode for 1 sequence"] == wide["decode for 1 sequence"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # six sequences were planned for
        assert torch.equal(_tokens(fast, 6), _tokens(tiny("llama", layers=3), 6))


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"decoding": []}, "there is no graph 'decoding' to plan; there are prefill, decode, verify, score"),
        ({"prefill": [{"heads": 3}]}, "prefill: heads=3: the graph has no heads"),
        ({"decode": [{"window": 4096}]}, "decode: window=4096 is more than the 64 rows"),
        ({"prefill": [{"step": "many"}]}, "prefill: step='many' is no size"),
        ({"prefill": {"step": 64}}, r"the shapes of prefill are \{'step': 64\}, which is no list of sets"),
        (["prefill"], r"the shapes \['prefill'\] are no mapping; give sets by graph"),
    ],
)
def test_shapes_that_no_graph_has(shapes: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        _planned(passes={"plan_memory": {"max_input_shapes": shapes}})


# The lines of code


@pytest.mark.parametrize("seed", range(20))
def test_offsets_hold_for_every_size(seed: int) -> None:
    """What the generated lines compute is what the planner's own order says, at sizes that nobody planned for."""
    chance = random.Random(seed)
    step, window = sympy.symbols("s1 s2", integer=True, positive=True)
    kinds = [64 * step, 4 * step * window, step, sympy.Integer(100), 256 * step + 4 * window, sympy.Integer(0)]
    buffers = []
    for number in range(12):
        start = chance.randrange(10)
        buffers.append(SymbolicBuffer(f"buf{number}", start, start + chance.randint(1, 5), chance.choice(kinds)))
    problem = SymbolicProblem(tuple(buffers))
    found = offset_lines(plan_symbolic(problem, [{"s1": 16, "s2": 64}], "order"))
    for sizes in ({"s1": 16, "s2": 64}, {"s1": 1, "s2": 1}, {"s1": 300, "s2": 2}, {"s1": 3, "s2": 5000}):
        scope: dict[str, Any] = dict(sizes)
        exec("\n".join(found.lines), scope)
        at = problem.at(sizes)
        places = {name: int(eval(str(offset), scope)) for name, offset in found.offsets.items()}
        taken = {one.name: places[one.name] for one in at.buffers if one.nbytes}
        arena = int(eval(str(found.total), scope))
        verify(at, taken, arena)
        assert all(place % ALIGN == 0 for place in places.values())
        assert arena <= sum(rounded(one.nbytes, ALIGN) for one in at.buffers)


def test_a_comment_that_is_read_again() -> None:
    one = Placement(128, 64, (PlacedBuffer("buf0", 1, 2, 60, 64, "float32 [15]", 3, "modeling.py:1"),))
    assert placement(f"import x\n    {one.comment()}\ndef call(): pass") == one
    assert placement("def call(): pass") is None


# Files


def test_activations_are_dumped_for_every_graph(tmp_path: Any) -> None:
    options = {"plan_memory": {"dump_activation_dag": str(tmp_path / "activation_dag.yaml")}}
    _planned(passes=options, compile="layer")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["activation_dag.decode.yaml", "activation_dag.prefill.yaml"]
    dag = load(tmp_path / names[1])
    assert dag.memory.status == "optimal"
    assert any(name.startswith("linear") for name in dag.operators)


def test_what_is_loaded_writes_no_files(tmp_path: Any) -> None:
    """A folder may come from anybody; what it says about files is not done."""
    options = {"plan_memory": {"dump_activation_dag": str(tmp_path / "dag.yaml")}}
    _planned(passes=options, compile="layer").fxopt.save(tmp_path / "saved")
    for path in tmp_path.glob("*.yaml"):
        path.write_text("precious")
    fxopt.load(tmp_path / "saved", tiny("llama", layers=3), code="again")
    assert {path.read_text() for path in tmp_path.glob("*.yaml")} == {"precious"}


def test_a_folder_that_is_not_there(tmp_path: Any) -> None:
    options = {"plan_memory": {"dump_activation_dag": str(tmp_path / "none" / "dag.yaml")}}
    with pytest.raises(InvalidRequestError, match=r"dump_activation_dag='.*dag.yaml' cannot be written"):
        _planned(passes=options, compile="layer")


def test_what_is_saved_is_placed_again(planned: Any, tmp_path: Any) -> None:
    planned.fxopt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved", tiny("llama", layers=3))
    assert loaded.fxopt.report.arenas == planned.fxopt.report.arenas
    assert torch.equal(_tokens(loaded), _tokens(planned))
    assert loaded.fxopt.arena_bytes == planned.fxopt.arena_bytes > 0


# CUDA


def test_recordings_do_not_hold_on_to_an_arena() -> None:
    assert "recorded as a CUDA graph" in str(unplaceable("inductor", torch.device("cuda")))
    assert unplaceable("inductor", torch.device("cpu")) is None
    with torch._inductor.config.patch(cpp_wrapper=True):
        assert "cpp_wrapper" in str(unplaceable("inductor", torch.device("cpu")))


@pytest.mark.cuda
def test_on_cuda_it_says_that_it_cannot() -> None:
    stock = tiny("llama", layers=3).cuda()
    with pytest.warns(UserWarning, match="plan_memory can do nothing: a decode step is recorded"):
        fast = fxopt.optimize(stock, 64, chunk=16, passes={"plan_memory": True})
    want = stock.generate(PROMPT.cuda(), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(fast.generate(PROMPT.cuda(), max_new_tokens=NEW, do_sample=False), want)
