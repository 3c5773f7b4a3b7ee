"""Plans are right, as small as they can be, and say how good they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sympy
from memory_problems import chain_problem, cut_problem, least_arena, random_problem

from fxopt.errors import FxoptError, InvalidRequestError
from fxopt.memory import (
    SOLVERS,
    Buffer,
    MemoryPlan,
    Plan,
    PlanError,
    Problem,
    SymbolicBuffer,
    SymbolicProblem,
    plan,
    plan_sets,
    plan_symbolic,
    verify,
)
from fxopt.memory import exact as exact_module
from fxopt.memory.exact import No, decide
from fxopt.memory.greedy import candidates
from fxopt.memory.instance import unit
from fxopt.memory.order import order_of
from fxopt.memory.search import PythonSearch
from fxopt.memory.sizes import Sizes, read_size

ALIGNS = (1, 16, 64)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here is decided in Python; the compiled search has tests of its own."""
    monkeypatch.setattr(exact_module, "_fastest", lambda: (PythonSearch, "the search ran in Python"))


def small_problems() -> list[Problem]:
    return [random_problem(seed, 2 + seed % 5, steps=6, aligns=(ALIGNS, (1,), (4, 6))[seed % 3]) for seed in range(150)]


def test_the_search_finds_what_brute_force_finds() -> None:
    above = 0
    for problem in [*small_problems(), *(random_problem(seed, 7, steps=7) for seed in range(6))]:
        least = least_arena(problem)
        for solver in ("auto", "exact"):
            made = plan(problem, solver)
            assert (made.size, made.proven, made.status, made.gap) == (least, least, "optimal", 0.0), problem
        above += least > problem.lower_bound
    assert above > 5, "the sample has problems whose lower bound cannot be reached"


def test_the_search_proves_that_one_byte_less_is_impossible() -> None:
    for problem in small_problems()[:60]:
        least, deadline = least_arena(problem), time.monotonic() + 10
        if not least:
            continue
        assert least % unit(problem) == 0
        found = decide(problem, least, deadline, PythonSearch)
        assert not isinstance(found, No)
        assert decide(problem, least - 1, deadline, PythonSearch) is No.IMPOSSIBLE


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_makes_right_plans(solver: str) -> None:
    for seed in range(25):
        problem = random_problem(seed, 30, aligns=ALIGNS)
        made = plan(problem, solver, budget_s=0.2)  # type: ignore[arg-type]
        made.verify()
        assert set(made.offsets) == {buffer.name for buffer in problem.buffers if buffer.nbytes}
        assert problem.lower_bound <= made.proven <= made.size
        assert made.status == ("optimal" if made.size == made.proven else "feasible")
        assert made.gap == pytest.approx(made.size / made.proven - 1)
        if solver == "naive":
            assert made.size >= made.naive == sum(buffer.size for buffer in problem.buffers)


def test_the_portfolio_is_no_worse_than_any_of_its_members() -> None:
    problem = random_problem(5, 60, steps=40)
    sizes = {candidate.maker: candidate.size for candidate in candidates(problem)}
    assert len(sizes) == 12
    assert plan(problem, "greedy").size == min(sizes.values())
    assert plan(problem, "tflite").size == sizes["greedy by size, best fit"]


def test_shared_blocks_by_hand() -> None:
    """Three blocks of 100: c shares with a; d is too large for what is free, and a block has one buffer at a time."""
    problem = Problem(
        [Buffer("a", 0, 2, 100, 1), Buffer("b", 1, 3, 90, 1), Buffer("c", 2, 4, 80, 1), Buffer("d", 0, 1, 10, 1)]
    )
    assert plan(problem, "itrex").size == 128 + 128
    assert plan(problem, "itrex").offsets == {"a": 0, "b": 128, "c": 0, "d": 128}
    assert plan(problem, "executorch").offsets == {"a": 0, "b": 100, "c": 0, "d": 100}
    assert plan(problem, "auto").itrex == 256
    assert plan(problem).size == problem.lower_bound == 190


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    problem = Problem([Buffer("a", 0, 2, 1), Buffer("b", 0, 2, 65), Buffer("c", 0, 2, 5, 16, padded=False)])
    assert [buffer.size for buffer in problem.buffers] == [64, 128, 5]
    assert problem.lower_bound == problem.naive == plan(problem).size == 197
    assert {offset % 64 for name, offset in plan(problem).offsets.items() if name != "c"} == {0}


def test_what_has_no_bytes_has_no_place_and_a_dead_value_has_its_step() -> None:
    problem = Problem(
        [Buffer("none", 0, 9, 0), Buffer("dead", 4, 5, 64), Buffer("before", 0, 4, 64), Buffer("after", 5, 9, 64)]
    )
    for solver in SOLVERS:
        made = plan(problem, solver)  # type: ignore[arg-type]
        assert "none" not in made.offsets
        assert made.size == (192 if solver == "naive" else 64)


def test_a_problem_without_bytes_needs_no_arena() -> None:
    for problem in (Problem([]), Problem([Buffer("none", 0, 1, 0)])):
        for solver in SOLVERS:
            made = plan(problem, solver)  # type: ignore[arg-type]
            assert (made.size, made.status, made.gap, dict(made.offsets)) == (0, "optimal", 0.0, {})


def test_a_chain_of_850_buffers_is_planned_to_its_bound_in_python() -> None:
    for tokens, past in ((512, 0), (1, 1023), (8, 8)):
        problem = chain_problem(24, tokens=tokens, past=past)
        assert len(problem.buffers) > 840
        started = time.process_time()
        made = plan(problem)
        found = decide(problem, problem.lower_bound, time.monotonic() + 10, PythonSearch)
        assert time.process_time() - started < 2.5  # a shared machine; a quarter of it is usual
        assert made.status == "optimal"
        assert not isinstance(found, No)


def test_the_budget_is_kept_and_the_gap_is_said() -> None:
    problem = cut_problem(3, 200)
    started = time.monotonic()
    made = plan(problem, budget_s=0.8)
    assert time.monotonic() - started < 2.0
    assert made.status == "feasible"
    assert made.gap == made.size / 1024 - 1 > 0
    assert made.note == "the search ran in Python"
    assert made.size <= plan(problem, "greedy").size


def test_a_capacity_is_enough() -> None:
    problem = cut_problem(0, 60)
    greedy = plan(problem, "greedy").size
    assert plan(problem, capacity=greedy).size == greedy
    assert plan(problem, capacity=greedy).maker.startswith("greedy")
    assert plan(problem, capacity=1024).size == 1024
    small = plan(problem, capacity=1023)
    assert small.size > 1023
    assert small.proven == 1024, "no capacity below the lower bound is searched"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Buffer("", 0, 1, 1), ["named ''"]),
        (lambda: Buffer("a", 3, 3, 1), ["a lives from 3 up to 3", "up to 4"]),
        (lambda: Buffer("a", 0, 1, -1), ["a has -1 bytes"]),
        (lambda: Buffer("a", 0, 1, 1, 0), ["a is aligned to 0"]),
        (lambda: Buffer("a", 0, 1, 1.5), ["nbytes is 1.5"]),  # type: ignore[arg-type]
        (lambda: Buffer("a", True, 2, 1), ["start is True"]),
        (lambda: Problem([Buffer("a", 0, 1, 1), Buffer("a", 0, 1, 1)]), ["a is there twice"]),
        (lambda: Problem([Buffer("a", 0, 1, 2**62)]), ["4,611,686,018,427,387,904"]),
        (lambda: plan(Problem([]), "best"), ["no solver 'best'", "auto, exact, greedy"]),  # type: ignore[arg-type]
        (lambda: plan(Problem([]), budget_s=0), ["budget_s is 0"]),
        (lambda: plan_sets([]), ["no set of sizes"]),
        (lambda: plan_sets([Problem([])], "min"), ["no merge 'min'", "tables, max, order"]),  # type: ignore[arg-type]
        (lambda: plan_sets([Problem([])], shapes=[{}, {}]), ["1 sets and shapes for 2"]),
        (lambda: plan_sets([Problem([]), Problem([Buffer("a", 0, 1, 1)])]), ["a is in one of them only"]),
        (lambda: plan_sets([Problem([Buffer("a", 0, n, 1)]) for n in (1, 2)]), ["a differs between set 0 and set 1"]),
        (lambda: plan_sets([Problem([])]).for_any_shape(), ["for its own shapes alone"]),
    ],
)
def test_refusals_are_sentences(make: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make()
    assert isinstance(caught.value, FxoptError)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


def broken_plans(made: Plan) -> Iterator[tuple[str, dict[str, int], int, list[str]]]:
    """Every way in which a plan can be wrong: what was done, offsets, arena, and what the sentence has to name."""
    offsets, named = dict(made.offsets), {buffer.name: buffer for buffer in made.problem.buffers}
    for name in offsets:
        yield "left out", {key: value for key, value in offsets.items() if key != name}, made.size, [name, "no place"]
        yield "negative", {**offsets, name: -64}, made.size, [name, "-64"]
        yield "not aligned", {**offsets, name: offsets[name] + 1}, made.size + 64, [name, "alignment"]
        yield "outside", {**offsets, name: made.size}, made.size, [name, "outside the arena"]
        yield "no number", {**offsets, name: float(offsets[name])}, made.size, [name]  # type: ignore[dict-item]
        for other in offsets:
            one, two = named[name], named[other]
            if name != other and one.start < two.end and two.start < one.end:
                yield "moved onto another", {**offsets, name: offsets[other]}, 2 * made.size, [name, "share bytes"]
                last = offsets[other] + two.size - 64
                yield "moved onto its end", {**offsets, name: last}, 2 * made.size, [name, "share bytes"]
    yield "unknown", {**offsets, "stranger": 0}, made.size, ["stranger"]
    yield "arena too small", offsets, made.size - 1, ["outside the arena"]


def test_verify_catches_every_kind_of_broken_plan() -> None:
    seen: dict[str, int] = {}
    for seed in range(6):
        problem = random_problem(seed, 9, aligns=(64,))
        made = plan(Problem(replace(buffer, padded=True) for buffer in problem.buffers), "greedy")
        for kind, offsets, size, words in broken_plans(made):
            with pytest.raises(PlanError) as caught:
                verify(made.problem, offsets, size)
            seen[kind] = seen.get(kind, 0) + 1
            for word in words:
                assert word in str(caught.value), (kind, str(caught.value))
    assert len(seen) == 9
    assert min(seen.values()) > 3


def test_verify_names_both_buffers() -> None:
    problem = Problem([Buffer("one", 0, 3, 64), Buffer("two", 2, 4, 64), Buffer("later", 4, 5, 64)])
    verify(problem, {"one": 0, "two": 64, "later": 0}, 128)
    with pytest.raises(
        PlanError, match=r"^one \(bytes 0 to 64, steps 0 to 3\) and two \(bytes 0 to 64, steps 2 to 4\)"
    ):
        verify(problem, {"one": 0, "two": 0, "later": 0}, 128)


def sets_of(seed: int, count: int = 4) -> list[Problem]:
    """One graph at several sizes, zero among them."""
    base = random_problem(seed, 25, steps=20, aligns=(64,))
    problems = []
    for number in range(count):
        sizes = random_problem(1000 * seed + number, 25).buffers
        problems.append(
            Problem(replace(one, nbytes=64 * two.nbytes) for one, two in zip(base.buffers, sizes, strict=True))
        )
    return problems


@pytest.mark.parametrize("merge", ["tables", "max", "order"])
def test_one_arena_for_several_sets(merge: str) -> None:
    for seed in range(5):
        problems = sets_of(seed)
        made = plan_sets(problems, merge, budget_s=1.0)  # type: ignore[arg-type]
        made.verify()
        assert made.lower_bound == max(problem.lower_bound for problem in problems)
        assert made.lower_bound <= made.proven <= made.arena == max(each.size for each in made.plans)
        assert made.status == ("optimal" if made.arena == made.proven else "feasible")
        tables = plan_sets(problems, budget_s=1.0)
        assert tables.arena <= made.arena
        assert made.itrex >= made.lower_bound
        if merge == "max":
            assert len({tuple(sorted(each.offsets.items())) for each in made.plans}) == 1


def test_an_order_holds_for_sizes_that_nobody_planned() -> None:
    for seed in range(5):
        order = plan_sets(sets_of(seed), "order", budget_s=1.0).order
        assert order is not None
        for other in sets_of(seed, count=30)[4:]:
            made = order.plan(other)
            made.verify()
            assert made.size >= other.lower_bound


def test_an_order_gives_back_the_plan_that_it_is_from() -> None:
    for seed in range(10):
        made = plan(random_problem(seed, 30, aligns=ALIGNS), budget_s=0.2)
        again = order_of(made).plan(made.problem)
        again.verify()
        assert again.size <= made.size


def symbolic_problem() -> SymbolicProblem:
    b, s, past = sympy.symbols("b s past", integer=True, positive=True)
    return SymbolicProblem(
        (
            SymbolicBuffer("x", 0, 3, 2304 * b * s),
            SymbolicBuffer("scores", 1, 4, 36 * b * s * (s + past)),
            SymbolicBuffer("keys", 0, 4, 768 * b * (s + past)),
            SymbolicBuffer("half", 2, 5, sympy.floor(s / 3) * 100),
            SymbolicBuffer("constant", 0, 5, 12),
        )
    )


def test_a_symbolic_plan_follows_the_shapes() -> None:
    problem = symbolic_problem()
    shapes = [{"b": 1, "s": 512, "past": 0}, {"b": 8, "s": 1, "past": 1023}]
    made = plan_symbolic(problem, shapes)
    assert made.merge == "order"
    any_shape = made.for_any_shape()
    for values in (*shapes, {"b": 3, "s": 50, "past": 7}, {"b": 1, "s": 1, "past": 1}):
        layout = any_shape.at(values)
        verify(problem.at(values), layout.offsets, layout.size)
        assert any_shape.at({**values, "unused": 1}) is layout, "computed once for each choice of shapes"
    assert [any_shape.at(values).size for values in shapes] == [each.size for each in made.plans]
    with pytest.raises(InvalidRequestError, match="depend on s, which has no value"):
        any_shape.at({"b": 1, "past": 1})


def test_sizes_are_computed_exactly() -> None:
    s, b = sympy.symbols("s b", integer=True, positive=True)
    thirds = sympy.floor(s / 49) + sympy.ceiling(s / 3) + sympy.Rational(1, 2) * b * (2 * s) + sympy.Mod(s, 8)
    sizes = Sizes([thirds, sympy.Max(s, 16) * sympy.Min(b, 3), s**2 * 10**15, 7])
    assert sizes.symbols == ("b", "s")
    assert sizes.at((5, 49)) == [1 + 17 + 245 + 1, 147, 49**2 * 10**15, 7]
    assert Sizes([read_size(str(one)) for one in sizes.expressions]).at((5, 49)) == sizes.at((5, 49))
    with pytest.raises(InvalidRequestError, match="is 1/2 for s = 1"):
        Sizes([s / 2]).at((1,))
    with pytest.raises(InvalidRequestError, match="is -1 for s = 1"):
        Sizes([s - 2]).at((1,))
    with pytest.raises(InvalidRequestError, match="sin"):
        Sizes([sympy.sin(s)])


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os')", "a.b", "9**9**9", "2**99999999", "s**-1", "lambda: 1", "[1]", "'x'", "1.5", "True"),
        *(
            "1/0",
            "floor()",
            "Mod(1)",
            "Max(1, key=2)",
            "",
            "a b",
            "-" * 1500 + "1",
            "(" * 500 + "1" + ")" * 500,
            "x" * 3000,
        ),
    ],
)
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(PlanError):
        read_size(text)


def test_a_memory_plan_has_one_table_of_figures() -> None:
    made = plan_sets([chain_problem(2, tokens=64), chain_problem(2, tokens=1, past=63)])
    assert isinstance(made, MemoryPlan)
    assert made.naive >= made.itrex >= made.arena == made.lower_bound
    assert (made.status, made.gap, made.worst) == ("optimal", 0.0, 0.0)
