"""``fast.fxopt.save``: everything about an optimised model but its weights, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fxopt.artifact.facts_json import facts_data
from fxopt.artifact.folder import check_target, write
from fxopt.artifact.graph_read import check_views
from fxopt.artifact.graph_write import graph_data
from fxopt.artifact.keys import Recipe, check_in_catalogue, keys_of, processor_of
from fxopt.artifact.native import check_same, code_of, package
from fxopt.artifact.plain import to_json, to_plain
from fxopt.artifact.report_json import report_data
from fxopt.artifact.roles import SavedRole
from fxopt.artifact.sources import constants_file, sources_of
from fxopt.chain import Chain
from fxopt.engine import Engine
from fxopt.lower import Lowered, planned
from fxopt.outline import outline
from fxopt.program import Program
from fxopt.progress import Progress
from fxopt.report import Report
from fxopt.specialise import Role


def save(
    folder: Path, model: PreTrainedModel, engine: Engine, symbolic: Program, report: Report, recipe: Recipe
) -> None:
    """Write a model to ``folder``; nothing there is touched before everything is ready."""
    progress = Progress()
    check_in_catalogue(recipe.passes)
    check_target(folder)
    compiled = engine.compiled
    with progress.step("write down the graphs"):
        sources, constants = sources_of([symbolic, *(graph.program for graph in compiled.values())], model)
        files = {
            "graph.json": to_json(_checked(symbolic)),
            "weights.json": to_json(to_plain(sources)),
            "constants.safetensors": constants_file(constants),
            "report.json": to_json(report_data(report)),
        }
    roles = []
    for role, graph in compiled.items():
        with progress.step(f"compile {role.name} for {role.sequences} into a package"):
            saved, parts = _role_files(role, graph)
        roles.append(saved)
        files |= {f"{saved.folder}/{name}": content for name, content in parts.items()}
    with progress.step("write"):
        keys = keys_of(model, recipe)
        manifest = {
            "keys": keys,
            "processor": processor_of(model.device) if any(one.pieces for one in roles) else None,
            "facts": facts_data(engine.facts),
            "roles": to_plain(roles),
        }
        write(folder, manifest, files)


def _role_files(role: Role, graph: Lowered) -> tuple[SavedRole, dict[str, bytes]]:
    program = graph.program
    # A package would allocate as it runs; code in an arena is compiled again when it is loaded.
    packages = _packages(role, graph) if program.facts.backend == "inductor" and graph.arena_use is None else []
    place = f"{role.name}-{role.batch or 'any'}"
    saved = SavedRole(place, role, graph.plan, graph.windowed, len(packages), graph.proof, graph.launches)
    files = {"graph.json": to_json(_checked(program))}
    return saved, files | {f"piece-{number}.pt2": content for number, content in enumerate(packages)}


def _checked(program: Program) -> dict[str, Any]:
    """A graph as data, if it can be loaded again."""
    check_views(program)
    return graph_data(program)


def _packages(role: Role, graph: Lowered) -> list[bytes]:
    """One package for each piece that is another; together they must do what the running code does."""
    program = graph.program
    plan, regions = planned(program, outline(program, layered=program.facts.layered))
    assert plan == graph.plan
    packages = [package(program, region) for region in regions]
    check_same(graph, Chain(plan, [code_of(content, "a new package") for content in packages]), role)
    return packages
