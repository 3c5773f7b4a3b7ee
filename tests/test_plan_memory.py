"""The pass ``plan_memory``: compiled code computes in one arena, and says the same."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.codegen import memory_planning

import fxopt
from fxopt import InvalidRequestError, RewriteError, inductor_arena
from fxopt.activation_dag import load
from fxopt.admission import select
from fxopt.arena_memory import Arena, SharedArena, room
from fxopt.families import tiny
from fxopt.inductor_arena import ArenaPlanner, in_one_arena, missing
from fxopt.memory import SymbolicBuffer, SymbolicProblem, plan_symbolic
from fxopt.memory.checker import verify
from fxopt.memory.problem import ALIGN, rounded
from fxopt.placement import Placement

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
        memory = honest(arena, nbytes)
        arena.here().poison()
        return memory

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


def test_the_page_draws_every_piece(planned: Any, tmp_path: Any) -> None:
    planned.fxopt.report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="memory-plan"') == 4  # what is embedded needs no arena, in either graph
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
    assert "ArithmeticError: no plan today" in caplog.text
    assert torch.equal(_tokens(fast), _tokens(tiny("llama", layers=3)))
    with pytest.raises(RewriteError, match="plan_memory matched 0 of 6 places"):
        _planned(compile="layer", strict=True)


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
    found = []

    def compile_something() -> None:
        found.append(ArenaPlanner.__base__ is not None and inductor_arena._here.sets is None)
        with torch._inductor.config.patch(memory_planning=True):
            compiled = torch.compile(lambda x: (x.sin() @ x).cos() @ x)
            x = torch.ones(8, 8)
            found.append(torch.allclose(compiled(x), (x.sin() @ x).cos() @ x))

    with in_one_arena([{}]):
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()
        assert memory_planning.MemoryPlanner is ArenaPlanner
    assert memory_planning.MemoryPlanner is not ArenaPlanner
    assert found == [True, True]


# The arena


def test_more_than_was_planned_grows_and_is_said_once(planned: Any) -> None:
    fast = _planned(compile="layer")
    stock = tiny("llama", layers=3)
    assert torch.equal(_tokens(fast, 2), _tokens(stock, 2))  # two sequences are planned for where nobody says more
    assert fast.fxopt.stats["arena grown"] == 0
    with pytest.warns(UserWarning, match=r"needs an arena of [\d,]+ bytes, but [\d,]+ were planned; it grows now"):
        assert torch.equal(_tokens(fast, 5), _tokens(stock, 5))
    assert fast.fxopt.stats["arena grown"] > 0
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
            seen.append((room(64, "cpu").data_ptr(), arena.here().memory.data_ptr()))
            if then is not None:
                then()
                seen.append((room(64, "cpu").data_ptr(), arena.here().memory.data_ptr()))
            return []

        return arena.running(body)

    one.reserve(128)
    other.reserve(128)
    code(one, code(other))()
    assert all(asked == own for asked, own in seen)
    assert len({own for _, own in seen}) == 2
    assert room(16, "cpu").nbytes == 16  # code that nobody runs in an arena has memory of its own


def test_what_a_recorded_step_writes_into_stays() -> None:
    """A CUDA graph goes on writing where it wrote when it was recorded."""
    arena = Arena("cpu")
    arena.device = torch.device("cuda")  # so far as the rule is concerned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda n, **_: torch.zeros(n, dtype=torch.uint8))
        arena.reserve(64)
        first = arena.memory
        arena.reserve(128)
    assert arena._former[-1].data_ptr() == first.data_ptr()


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
        ({"decoding": []}, "max_input_shapes speaks of a graph 'decoding'; there are prefill, decode, verify, score"),
        ({"prefill": [{"heads": 3}]}, "prefill: heads=3: the graph has no heads"),
        ({"decode": [{"window": 4096}]}, "decode: window=4096 is more than the 64 rows"),
        ({"prefill": [{"step": "many"}]}, "prefill: step='many' is no size"),
    ],
)
def test_shapes_that_no_graph_has(shapes: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        _planned(passes={"plan_memory": {"max_input_shapes": shapes}})


# The lines of code


@pytest.mark.parametrize("seed", range(20))
def test_offsets_hold_for_every_size(seed: int) -> None:
    """What the generated lines compute is what the planner's own order says, at sizes that nobody planned for."""
    import random

    import sympy

    chance = random.Random(seed)
    step, window = sympy.symbols("s1 s2", integer=True, positive=True)
    kinds = [64 * step, 4 * step * window, step, sympy.Integer(100), 256 * step + 4 * window, sympy.Integer(0)]
    buffers = []
    for number in range(12):
        start = chance.randrange(10)
        buffers.append(SymbolicBuffer(f"buf{number}", start, start + chance.randint(1, 5), chance.choice(kinds)))
    problem = SymbolicProblem(tuple(buffers))
    offsets, total, lines = inductor_arena._offsets(plan_symbolic(problem, [{"s1": 16, "s2": 64}], "order"))
    for sizes in ({"s1": 16, "s2": 64}, {"s1": 1, "s2": 1}, {"s1": 300, "s2": 2}, {"s1": 3, "s2": 5000}):
        scope: dict[str, Any] = dict(sizes)
        exec("\n".join(lines), scope)
        at = problem.at(sizes)
        places = {name: int(eval(str(offset), scope)) for name, offset in offsets.items()}
        taken = {one.name: places[one.name] for one in at.buffers if one.nbytes}
        arena = int(eval(str(total), scope))
        verify(at, taken, arena)
        assert all(place % ALIGN == 0 for place in places.values())
        assert arena <= sum(rounded(one.nbytes, ALIGN) for one in at.buffers)


def test_a_comment_that_is_read_again() -> None:
    from fxopt.placement import PlacedBuffer, placement

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


def test_a_folder_that_is_not_there(tmp_path: Any) -> None:
    options = {"plan_memory": {"dump_activation_dag": str(tmp_path / "none" / "dag.yaml")}}
    with pytest.raises(InvalidRequestError, match=r"dump_activation_dag='.*dag.yaml' cannot be written"):
        _planned(passes=options, compile="layer")


def test_what_is_saved_is_placed_again(planned: Any, tmp_path: Any) -> None:
    planned.fxopt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved", tiny("llama", layers=3))
    assert loaded.fxopt.arena_bytes == planned.fxopt.arena_bytes > 0
    assert loaded.fxopt.report.arenas == planned.fxopt.report.arenas
    assert torch.equal(_tokens(loaded), _tokens(planned))


# CUDA


@pytest.mark.cuda
def test_on_cuda() -> None:
    stock = tiny("llama", layers=3).cuda()
    prompt = PROMPT.cuda()
    fast = fxopt.optimize(stock, 64, chunk=16, passes={"plan_memory": True}, compile="layer")
    want = stock.generate(prompt, max_new_tokens=NEW, do_sample=False)
    for _ in range(2):
        assert torch.equal(fast.generate(prompt, max_new_tokens=NEW, do_sample=False), want)
    assert fast.fxopt.stats["arena grown"] == 0
    assert fast.fxopt.arena_bytes == max(use.arena for use in fast.fxopt.report.arenas.values())
