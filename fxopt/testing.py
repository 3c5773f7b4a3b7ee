"""Testing a pass of your own: one call checks all that can be checked without knowing what it is for.

    def test_my_pass() -> None:
        check_pass(MyPass(), matched={"llama": 5, "gpt2": 0}, golden=Path(__file__).parent / "golden")

Graphs of the tiny models are kept for as long as the process lives, so that further passes are
checked quickly. What is wrong comes as one AssertionError with a sentence for each model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from fxopt.capture import capture
from fxopt.driver import apply, require
from fxopt.errors import InvalidRequestError, first_line
from fxopt.families import tiny
from fxopt.judge import Judge
from fxopt.listing import readable
from fxopt.outcome import Outcome
from fxopt.passes import DEFAULT_PASSES, PASSES
from fxopt.program import Program, whole_windows
from fxopt.registry import Placed, ordered
from fxopt.rewrite import Pass, Stage
from fxopt.specialise import Role, specialise

Model: TypeAlias = str | PreTrainedModel  # a name out of fxopt.families.FAMILIES, or a model of one's own

MAX_LEN = 100
BATCH = 1  # of graphs for single tokens
GOLDEN_LAYER = 1  # the second: it has one in front of it


def check_pass(
    rewriter: Pass[Any],
    models: Iterable[Model] = ("llama", "gemma2", "gpt2"),
    *,
    matched: Mapping[str, int] | None = None,
    before: Iterable[Pass[Any]] | None = None,
    golden: Path | None = None,
    update_golden: bool = False,
) -> dict[str, Outcome]:
    """Apply a pass to models and check it; what it did comes back by the names of the models.

    It must match as many places as ``matched`` says for a model, or else as it expects itself; leave
    the graph and the weights that it was given alone; stamp what it makes; find nothing to do in its
    own result; and compute what the stock model computes. ``before`` lists the passes in front of
    it, by default the built-in ones. ``golden`` is a folder of texts, one for each model, that the
    second layer is compared with; ``update_golden`` writes them.
    """
    __tracebackhide__ = True  # what pytest shows is where the check was asked for
    named = {_name(model): model for model in models}
    wanted = dict(matched or {})
    if unknown := wanted.keys() - named.keys():
        raise InvalidRequestError(f"matched speaks of {', '.join(sorted(unknown))}; the models are {', '.join(named)}")
    front = _in_front(rewriter) if before is None else tuple(before)
    complaints: list[str] = []
    outcomes: dict[str, Outcome] = {}
    for name, model in named.items():
        trial = _tried(rewriter, model, front)
        path = golden / f"{name}_{rewriter.name}.txt" if golden is not None else None
        found = _complaints(trial, wanted.get(name, trial.outcome.expected), path, update_golden)
        complaints += [f"{rewriter.name} on {name}: {complaint}" for complaint in islice(found, 1)]
        outcomes[name] = trial.outcome
    if not wanted and all(outcome.expected is None and not outcome.matched for outcome in outcomes.values()):
        complaints.append(f"{rewriter.name} matched nothing on {', '.join(named)}, so that nothing was tested")
    if complaints:
        raise AssertionError("\n".join(complaints))
    return outcomes


def graph_of(model: Model, passes: Iterable[Pass[Any]] | None = None, *, stage: Stage = Stage.SYMBOLIC) -> Program:
    """The graph of a model behind some passes, by default behind those that ``optimize`` applies up to a stage.

    It is shared by all who ask for the same: look at it, and edit a ``copy()``.
    """
    if passes is None:
        passes = [kind() for kind in DEFAULT_PASSES if kind.stage in (Stage.SYMBOLIC, stage)]
    return _graph(model, tuple(passes), stage)


@cache
def _graph(model: Model, passes: tuple[Pass[Any], ...], stage: Stage) -> Program:
    if stage is Stage.DECODE and (not passes or passes[-1].stage is Stage.SYMBOLIC):
        return specialise(_graph(model, passes, Stage.SYMBOLIC), Role("decode", BATCH, longest_step=1))
    if not passes:
        return capture(_stock(model), max_len=MAX_LEN, capacity=whole_windows(MAX_LEN), backend="inductor")
    *front, last = passes
    program, outcome = apply(last, _graph(model, tuple(front), stage))
    require(last, outcome)
    return program


@cache
def _judge(model: Model) -> Judge:
    return Judge(_stock(model), MAX_LEN)


@cache
def _stock(model: Model) -> PreTrainedModel:
    return tiny(model) if isinstance(model, str) else model


def _name(model: Model) -> str:
    return model if isinstance(model, str) else str(model.config.model_type)


def _in_front(rewriter: Pass[Any]) -> tuple[Pass[Any], ...]:
    """The built-in passes behind which this one goes, of those that are applied by default."""
    built_in = {kind.name: kind for kind in PASSES if kind.by_default}
    if rewriter.after is not None and rewriter.after not in built_in:
        raise InvalidRequestError(
            f"{rewriter.name} goes behind {rewriter.after}, which is not built in; list what goes in front in before="
        )
    everything: dict[str, Placed] = {**built_in, rewriter.name: rewriter}
    names = [one.name for one in ordered(everything.values())]
    return tuple(built_in[name]() for name in names[: names.index(rewriter.name)])


@dataclass(frozen=True)
class _Trial:
    """One pass on one model, and what was there before."""

    rewriter: Pass[Any]
    model: Model
    front: tuple[Pass[Any], ...]
    before: Program
    text: str
    versions: dict[str, int]
    after: Program
    outcome: Outcome


def _tried(rewriter: Pass[Any], model: Model, front: tuple[Pass[Any], ...]) -> _Trial:
    before = _graph(model, front, rewriter.stage)
    text, versions = readable(before), _versions(before)
    try:
        after, outcome = apply(rewriter, before)
    except Exception as error:
        raise AssertionError(
            f"{rewriter.name} on {_name(model)} raised {type(error).__name__}: {first_line(error)}"
        ) from error
    return _Trial(rewriter, model, front, before, text, versions, after, outcome)


def _versions(program: Program) -> dict[str, int]:
    """How often each weight has been written to."""
    return {str(node.target): tensor._version for node, tensor in program.weights()}


def _complaints(trial: _Trial, wanted: int | None, golden: Path | None, update_golden: bool) -> Iterator[str]:
    """What is wrong, the plainest first."""
    yield from _about_what_was_given(trial)
    yield from _about_the_count(trial.outcome, wanted)
    yield from _about_new_nodes(trial)
    yield from _about_the_second_time(trial)
    yield from _about_the_result(trial)
    if golden is not None:
        yield from _about_the_text(trial, golden, update_golden)


def _about_what_was_given(trial: _Trial) -> Iterator[str]:
    found = _versions(trial.before)
    written = [name for name, version in trial.versions.items() if found[name] != version]
    is_changed = readable(trial.before) != trial.text
    if written or is_changed:
        for kept in (_graph, _judge, _stock):  # what they hold is spoilt for other passes too
            kept.cache_clear()
    if written:
        yield f"it wrote into {', '.join(written)}, the model's own; make a node that computes the new weight"
    if is_changed:
        yield "it changed the graph that it was given; edit the program that find and rewrite are called with"


def _about_the_count(outcome: Outcome, wanted: int | None) -> Iterator[str]:
    if outcome.dropped is not None:
        yield f"it was not applied: {outcome.dropped}"
    if wanted is not None and outcome.matched != wanted:
        left = [f"{spot.node} ({spot.source}): {spot.reason}" for spot in (*outcome.refused, *outcome.near)]
        yield f"it matched {outcome.matched} of {wanted} places; left alone: {'; '.join(left[:3]) or 'none'}"


def _about_new_nodes(trial: _Trial) -> Iterator[str]:
    known = {node.name for node in trial.before.graph.nodes}
    for node in trial.after.graph.nodes:
        if node.name in known:
            continue
        if "val" not in node.meta:
            yield f"{node} is new and has no meta['val']"
        if trial.rewriter.name not in node.meta.get("fxopt", ()):
            yield f"{node} was made outside of rewrite and finish; find and refuse may only look"


def _about_the_second_time(trial: _Trial) -> Iterator[str]:
    again, outcome = apply(trial.rewriter, trial.after)
    if outcome.matched:
        yield f"in its own result it matches again: {outcome.sites[0].node} and {outcome.matched - 1} more"
    if difference := _difference(readable(trial.after), readable(again)):
        yield f"applied to its own result it matches nothing, and yet changes it:\n{difference}"


def _about_the_result(trial: _Trial) -> Iterator[str]:
    if trial.outcome.matched == 0 and readable(trial.after) == trial.text:
        return
    judge = _judge(trial.model)
    try:
        if trial.rewriter.stage is Stage.SYMBOLIC:
            _, complaint = judge.graph(trial.after)
        else:
            symbolic = tuple(one for one in trial.front if one.stage is Stage.SYMBOLIC)
            _, complaint = judge.decode(_graph(trial.model, symbolic, Stage.SYMBOLIC), trial.after, BATCH)
    except Exception as error:
        yield f"its graph fails when run, {type(error).__name__}: {first_line(error)}"
        return
    if complaint is not None:
        yield f"it computes something else than the stock model: {complaint}"


def _about_the_text(trial: _Trial, path: Path, update: bool) -> Iterator[str]:
    text = readable(trial.after, layers=[GOLDEN_LAYER]) + "\n"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if not path.exists():
        yield f"there is no golden text {path}; make it with update_golden=True, and read it before you commit it"
    elif difference := _difference(path.read_text(encoding="utf-8"), text):
        yield f"the text is not that of {path}; if it should change, use update_golden=True:\n{difference}"


def _difference(before: str, after: str) -> str:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))
    return "\n".join(line for line in lines[2:] if not line.startswith("@@"))
