"""``load``: an optimised model from a folder, checked to the last byte before anything is done with it."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxopt.admission import admit, select
from fxopt.artifact.facts_json import read_facts
from fxopt.artifact.folder import Archive, read
from fxopt.artifact.graph_read import Draft, read_graph
from fxopt.artifact.keys import Recipe, compare, keys_of, pass_from, pass_record, processor_of
from fxopt.artifact.native import code_of
from fxopt.artifact.plain import expect, from_plain, to_plain
from fxopt.artifact.report_json import read_report
from fxopt.artifact.roles import SavedRole, check_fits, check_plan
from fxopt.artifact.sources import Source, check_sources, note_parts, read_constants, weights_from
from fxopt.chain import Chain, Code
from fxopt.compiler import Compiler
from fxopt.engine import Engine
from fxopt.errors import ArtifactError, InvalidRequestError
from fxopt.lower import Lowered
from fxopt.model import make_fast
from fxopt.pipeline import Pipeline, Policy
from fxopt.program import Facts, Program
from fxopt.progress import Progress
from fxopt.report import Report
from fxopt.request import Request
from fxopt.rewrite import Pass
from fxopt.specialise import Role

Model = TypeVar("Model", bound=PreTrainedModel)
T = TypeVar("T")

#: Whose compiled code is run: that of folders that this user saved, anybody's, or none.
WhoseCode = Literal["signed", "trusted", "again"]


@torch.inference_mode(False)  # weights re-seated in that mode could not be trained afterwards
def load(
    folder: str | Path,
    model: Model,
    *,
    code: WhoseCode = "signed",
    expected: Mapping[str, Any] | None = None,
) -> Model:
    """What ``fast.fxopt.save(folder)`` has written, on the weights of ``model``.

    The folder must have been saved for such a model, with these versions, on such a machine; the
    first thing that differs is named. ``expected`` holds options as ``optimize`` takes them, such as
    ``{"max_len": 512}``, that it must have been made with. Compiled code is run if you saved the
    folder yourself (``code="signed"``), or if you trust whoever did (``"trusted"``); ``"again"``
    runs none of it and compiles the saved graphs on this machine. The stock model stays as it is.
    """
    if code not in get_args(WhoseCode):
        raise InvalidRequestError(f"code={code!r} is not one of {', '.join(get_args(WhoseCode))}")
    if not isinstance(model, PreTrainedModel):
        raise InvalidRequestError(f"a {type(model).__name__} was given, but the Hugging Face causal LM is needed")
    if not isinstance(expected, Mapping | None):
        raise InvalidRequestError(f"expected={expected!r} is no mapping; give options by name, as {{'max_len': 512}}")
    if not isinstance(folder, str | os.PathLike):
        raise InvalidRequestError(f"folder={folder!r} is no path; give the folder that was saved to")
    progress = Progress()
    with progress.step("read"):
        archive = read(Path(folder))
        saved = _Saved.of(archive, model, code, expected or {})
    with progress.step("load compiled code"):
        pieces = {one.role: saved.code(one) for one in saved.roles if one.pieces and code != "again"}
    with progress.step("pack weights"):
        weights = weights_from(saved.sources, saved.constants, model, saved.facts)
    engine, symbolic = _engine(saved, weights, pieces, progress)
    return make_fast(model, engine, symbolic, saved.report, saved.recipe)


@dataclass(frozen=True)
class _Saved:
    """All that was in the folder, checked, before any of it is used."""

    archive: Archive
    request: Request
    recipe: Recipe
    facts: Facts
    report: Report
    roles: tuple[SavedRole, ...]
    symbolic: Draft
    drafts: dict[Role, Draft]
    sources: dict[str, Source]
    constants: dict[str, Tensor]

    @classmethod
    def of(cls, archive: Archive, model: PreTrainedModel, code: WhoseCode, expected: Mapping[str, Any]) -> _Saved:
        manifest = archive.manifest
        roles: tuple[SavedRole, ...] = from_plain(tuple[SavedRole, ...], manifest.get("roles"), "manifest.json: roles")
        if code == "signed" and not archive.mine:
            raise ArtifactError(_foreign(roles))
        request, recipe = _fitting(manifest, model, expected)
        if code != "again" and any(one.pieces for one in roles):
            compare({"processor": manifest.get("processor")}, {"processor": processor_of(model.device)})
        facts = read_facts(manifest.get("facts"), asdict(request), model.device)
        sources = from_plain(dict[str, Source], archive.json("weights.json"), "weights.json")
        constants = read_constants(archive.file("constants.safetensors"), "constants.safetensors")
        check_sources(sources, constants, model, facts, "weights.json")

        def draft(name: str) -> Draft:
            found = read_graph(archive.json(name), model.device, name)
            check_fits(found, facts, sources, name)
            note_parts(found.graph, sources)
            return found

        symbolic = draft("graph.json")
        drafts = {one.role: draft(f"{one.folder}/graph.json") for one in roles}
        for one in roles:
            check_plan(one, drafts[one.role], sources)
        report = read_report(archive.json("report.json"), "report.json")
        return cls(archive, request, recipe, facts, report, roles, symbolic, drafts, sources, constants)

    def code(self, one: SavedRole) -> list[Code]:
        names = [f"{one.folder}/piece-{number}.pt2" for number in range(one.pieces)]
        return [code_of(self.archive.file(name), name) for name in names]


def _foreign(roles: tuple[SavedRole, ...]) -> str:
    pieces = sum(one.pieces for one in roles)
    runs = f"run {pieces} pieces of compiled code" if pieces else "run graphs"
    return (
        f"you did not save this folder, or it was edited since: its signature is not by your key. Loading it would "
        f'{runs} that somebody else can have written. If you trust them, load with code="trusted"; '
        'code="again" runs no code of theirs and compiles the saved graphs on this machine'
    )


def _fitting(manifest: dict[str, Any], model: PreTrainedModel, expected: Mapping[str, Any]) -> tuple[Request, Recipe]:
    """What was asked for when it was saved, if that fits this model, this installation and what is expected."""
    keys = expect(dict, manifest.get("keys"), "manifest.json: keys")
    compare(keys, keys_of(model, Recipe({}, ())) | {name: keys.get(name) for name in ("options", "passes", "dropped")})
    request: Request = from_plain(Request, keys.get("options"), "manifest.json: options")
    records = expect(list, keys.get("passes"), "manifest.json: passes")
    passes = tuple(pass_from(record, "manifest.json: passes") for record in records)
    dropped = from_plain(dict[str, str], keys.get("dropped"), "manifest.json: dropped")
    _check_expected(request, passes, dropped, expected)
    admit(model, request)
    return request, Recipe(asdict(request), passes, dropped)


_EXPECT = "load what was saved with these options, or optimise and save with those that you expect"


def _check_expected(
    request: Request, passes: tuple[Pass[Any], ...], dropped: Mapping[str, str], expected: Mapping[str, Any]
) -> None:
    options = asdict(request)
    for name, value in expected.items():
        if name == "passes":
            wanted = [one for one in select(value) if one.name not in dropped]
            compare({"passes": _records(passes)}, {"passes": _records(wanted)}, so=_EXPECT)
        elif name not in options:
            raise InvalidRequestError(f"expected names {name!r}; there are passes, {', '.join(options)}")
        else:
            compare({name: options[name]}, {name: to_plain(value)}, so=_EXPECT)


def _records(passes: Iterable[Pass[Any]]) -> dict[str, Any]:
    return {one.name: pass_record(one) for one in passes}


def _engine(
    saved: _Saved, weights: dict[str, Tensor], pieces: Mapping[Role, list[Code]], progress: Progress
) -> tuple[Engine, Callable[[], Program]]:
    """An engine that has the saved graphs, and makes others from the symbolic one when they are asked for."""
    facts, request = saved.facts, saved.request
    symbolic = _once(functools.partial(saved.symbolic.program, weights, facts))
    policy = Policy(strict=request.strict, batch=request.max_batch or 1)

    compiler = Compiler(request.backend, saved.recipe.passes, facts, request.limits)

    def source(role: Role) -> Lowered:
        return compiler(Pipeline(saved.recipe.passes, symbolic(), policy).compilable(role), role)

    engine = Engine(facts, source, request.limits, compiler.arena)
    for one in saved.roles:
        program = _once(functools.partial(saved.drafts[one.role].program, weights, facts))
        if one.role not in pieces:
            with progress.step(f"compile {one.role.name} for {one.role.sequences}"):
                graph = compiler(program(), one.role)
        else:
            chain = Chain(one.plan, pieces[one.role])
            given = tuple(weights[name] for name in one.plan.weights)
            graph = Lowered(program, chain, one.plan, given, one.windowed, one.proof, one.launches)
        engine.adopt(one.role, graph)
    return engine, symbolic


def _once(make: Callable[[], T]) -> Callable[[], T]:
    """What ``make`` makes, made when it is first asked for, by whatever thread."""
    lock, made = threading.Lock(), list[T]()

    def get() -> T:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get
