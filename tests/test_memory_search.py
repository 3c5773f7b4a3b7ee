"""The compiled search: the same as the one in Python, built once, and never in the way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_problems import chain_problem, cut_problem, least_arena, random_problem

from fxopt.memory import native, plan
from fxopt.memory.exact import No, decide
from fxopt.memory.instance import instances
from fxopt.memory.native import CompiledSearch, NoCompiledSearchError, cache_folder, library
from fxopt.memory.search import PythonSearch

HARD = cut_problem(0, 300)  # greedy is a third too large, and the search needs minutes


def forget() -> None:
    native._outcome.cache_clear()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the library in it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXOPT_HOME", str(folder))
        forget()
        try:
            library()
        except NoCompiledSearchError as error:
            pytest.skip(str(error))
        yield folder
    forget()


@pytest.fixture
def new_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not asked for the library."""
    monkeypatch.setenv("FXOPT_HOME", str(tmp_path))
    forget()
    yield tmp_path
    forget()


@pytest.mark.usefixtures("home")
def test_both_forms_take_the_same_steps() -> None:
    problems = [random_problem(seed, 25, aligns=(1, 16, 64)) for seed in range(12)]
    problems += [cut_problem(seed, 40) for seed in range(6)] + [chain_problem(3, tokens=8, past=8)]
    for problem in problems:
        for instance in list(instances(problem))[::3]:
            for capacity in (problem.lower_bound, problem.lower_bound + 64):
                python, compiled = PythonSearch(instance, capacity), CompiledSearch(instance, capacity)
                for steps in (3, 50, 400):  # stopped and gone on with
                    answer = python.run(steps, time.monotonic() + 60)
                    assert compiled.run(steps, time.monotonic() + 60) is answer
                if answer:
                    assert compiled.offsets == python.offsets


@pytest.mark.usefixtures("home")
def test_the_compiled_search_finds_what_brute_force_finds() -> None:
    for seed in range(60):
        problem = random_problem(seed, 2 + seed % 5, steps=6, aligns=(1, 6, 16))
        least = least_arena(problem)
        if not least:
            continue
        assert not isinstance(decide(problem, least, time.monotonic() + 10, CompiledSearch), No)
        assert decide(problem, least - 1, time.monotonic() + 10, CompiledSearch) is No.IMPOSSIBLE


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("seed", "pieces"), [(0, 120), (2, 120), (3, 120), (2, 200)])
def test_rectangles_cut_in_pieces_fit_again(seed: int, pieces: int) -> None:
    problem = cut_problem(seed, pieces)
    made = plan(problem, "exact", budget_s=30)
    made.verify()
    assert (made.size, made.lower_bound, made.status) == (1024, 1024, "optimal")
    assert plan(problem, "greedy").size > 1024


@pytest.mark.usefixtures("home")
def test_the_compiled_search_keeps_the_budget() -> None:
    started = time.monotonic()
    made = plan(HARD, budget_s=1.5)
    assert time.monotonic() - started < 3.0
    assert made.note == "", "nothing would have helped but time"
    assert made.status == "feasible"
    assert made.size < plan(HARD, "greedy").size, "what lies between the bound and greedy was searched as well"


def test_a_library_of_another_process_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("it was built again"))
    library()
    assert len(list((home / "compiled").iterdir())) == 1


def test_a_damaged_library_is_built_again(home: Path, new_home: Path) -> None:
    (whole,) = (home / "compiled").iterdir()
    content = whole.read_bytes()
    folder = cache_folder()
    folder.mkdir(mode=0o700)
    for damaged in (b"", content[: len(content) // 2], content[:-8] + b"\1" * 8, b"no library"):
        (folder / whole.name).write_bytes(damaged)
        assert native._kept(folder, whole.name.split("-")[1]) is None
        assert not list(folder.iterdir()), "it was removed, not loaded"
    (folder / whole.name).write_bytes(content[:-1])
    library()
    assert [path.read_bytes() == content for path in folder.iterdir()] == [True]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes that start at once")
def test_two_processes_build_at_once(home: Path, new_home: Path) -> None:
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=library) for _ in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=120)
    assert [process.exitcode for process in running] == [0, 0]
    assert [path.name for path in cache_folder().iterdir()] == [path.name for path in (home / "compiled").iterdir()]
    assert native._kept(cache_folder(), next(cache_folder().iterdir()).name.split("-")[1]) is not None


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_the_cache_is_of_this_user_alone(home: Path, new_home: Path) -> None:
    assert (home / "compiled").stat().st_mode & 0o777 == 0o700
    assert native._own_folder() == cache_folder()
    cache_folder().chmod(0o777)
    assert native._own_folder() is None, "what others can write is not loaded"
    library()
    assert not list(cache_folder().iterdir())


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [
        (None, "there is no C++ compiler; install one (g++), or name yours in CXX"),
        ("echo version; exit 0", "cannot be built or loaded"),
        ('[ "$1" = --version ] || { echo "search.cpp:1: no such thing" >&2; exit 1; }', "search.cpp:1: no such thing"),
        ("exit 3", "returned non-zero exit status 3"),
    ],
)
def test_without_a_compiler_python_searches(
    new_home: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, sentence: str
) -> None:
    tools = new_home / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    if compiler:
        script = tools / "g++"
        script.write_text(f"#!/bin/sh\n{compiler}\n")
        script.chmod(0o755)
    with pytest.raises(NoCompiledSearchError) as caught:
        library()
    assert sentence in str(caught.value)
    made = plan(HARD, budget_s=0.7)
    made.verify()
    assert made.status == "feasible"
    assert made.gap > 0
    assert made.note.startswith("the search ran in Python, which is slow: ")
    assert sentence in made.note


@pytest.mark.usefixtures("home")
def test_the_compiler_that_the_environment_names_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -g0")
    assert native._compiler()[1:] == ["-g0"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native._compiler()[0].endswith(native.COMPILERS)


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("seconds", [0.2, 1.0])  # within the half second of Python, and after it
def test_an_interrupt_ends_the_search(seconds: float) -> None:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C does
    started = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with pytest.raises(KeyboardInterrupt):
            plan(HARD, budget_s=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < seconds + 2
