"""A report as text for a terminal, 100 columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from tabulate import tabulate

from fxopt.changes import ranges
from fxopt.offload.use import CacheUse, StreamUse, WeightUse
from fxopt.outcome import Outcome, Spot
from fxopt.placement import ArenaUse
from fxopt.report_data import ReportData
from fxopt.step_cost import StepCost

WIDTH = 100  # columns
OPERATORS = 5  # of a pass, by name


def as_text(report: ReportData) -> str:
    parts = [f"{report.model}, max_len {report.max_len}, backend {report.backend}", _passes(report)]
    steps = [(stage.name, stage.step) for stage in report.stages if stage.step is not None and stage.dropped is None]
    if steps:
        parts.append(
            f"One decode step, batch {report.batch}, {report.context} rows of the cache filled (bytes; K = 1024):"
        )
        parts.append(_steps(steps))
    came = [line for stage in report.passes for line in _operators(stage)]
    if came:
        parts.append("\n".join(["Operators that came and went:", *came]))
    left = [line for stage in report.passes for line in _left_alone(stage)]
    if left:
        parts.append("\n".join(["Left alone:", *left]))
    closing = "\n".join(_closing(report))
    return "\n\n".join([*parts, closing]) if closing else "\n\n".join(parts)


def _passes(report: ReportData) -> str:
    headers = ["pass", "expected", "matched", "left alone", "nodes", "verified", "seconds"]
    rows = [
        [
            stage.name,
            "" if stage.expected is None else stage.expected,
            "dropped" if stage.dropped else stage.matched,
            len(_told(stage)) or "",
            f"{stage.nodes_before} → {stage.nodes_after}",
            "" if stage.verified is None else f"{stage.verified.error:.0e} of {stage.verified.allowed:.0e}",
            f"{stage.seconds:.2f}",
        ]
        for stage in report.passes
    ]
    if not any(stage.verified for stage in report.passes):
        headers.remove("verified")
        rows = [[*row[:5], row[6]] for row in rows]
    return _table(headers, rows)


def _steps(steps: list[tuple[str, StepCost]]) -> str:
    headers = ["after", "kernels", "weights", "KV read", "KV write", "copied", "moved", "FLOPs", "peak"]
    rows = [
        [
            name,
            step.launches,
            *map(
                size,
                (step.weight_bytes, step.kv_read_bytes, step.kv_written_bytes, step.copied_bytes, step.moved_bytes),
            ),
            count(step.flops),
            size(step.peak_bytes),
        ]
        for name, step in steps
    ]
    return _table(headers, rows)


def _table(headers: list[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, numbers to the right."""
    columns = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True, colalign=columns)


def size(number: int) -> str:
    """Bytes with the unit that leaves one to three digits in front."""
    return _scaled(number, 1024, ("", "K", "M", "G", "T"))


def count(number: int) -> str:
    return _scaled(number, 1000, ("", "k", "M", "G", "T"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    if number == 0:
        return "0"
    power = 0
    while number >= base - 0.5 and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = f"{number:.0f}" if number >= 99.5 or power == 0 else f"{number:.1f}"
    return f"{digits}{units[power]}"


def _operators(stage: Outcome) -> Iterator[str]:
    """The largest changes; all of them are in the data."""
    if not stage.ops or stage.dropped:
        return
    shown = [f"{change:+} {op.removeprefix('aten.').removesuffix('.default')}" for op, change in stage.ops.items()]
    more = f", {len(shown) - OPERATORS} more" if len(shown) > OPERATORS else ""
    line = f"  {stage.name}: {', '.join(shown[:OPERATORS])}{more}"
    yield from textwrap.wrap(line, WIDTH, subsequent_indent="      ")


def _closing(report: ReportData) -> Iterator[str]:
    lines: list[str] = []
    for check in report.checks:
        took = f", {check.seconds:.1f} s" if check.seconds else ""
        where = f" at {check.where}" if check.where else ""
        note = f", {check.note}" if check.note else ""
        error = f"error {check.error:.1e} of {check.allowed:.1e} allowed"
        lines.append(f"verified {check.what}{note}: {error}{where}{took}")
    for name, proof in report.proofs.items():
        verdict = "no cache-sized copy" if proof.holds else "COPIES A CACHE: " + "; ".join(proof.copies)
        lines.append(f"in place, {name}: {proof.writes} cache writes, {verdict}")
    if report.launches:
        counts = ", ".join(f"{name} {number}" for name, number in report.launches.items())
        lines.append(f"kernels in the compiled code: {counts}")
    if report.graphs:
        lines.append("graphs: " + "; ".join(f"for {batch} {ready}" for batch, ready in report.graphs.items()))
    if report.arenas:
        lines.append(_arena(list(report.arenas.values())))
    if report.attention is not None:
        lines.append(f"decode attention: {report.attention.quickest or 'library'}; timed: {report.attention}")
    if report.linears is not None:
        lines.append(f"matrix products: {report.linears.quickest}; timed: {report.linears}")
    if report.packed_bytes:
        lines.append(f"packed weights: {size(report.packed_bytes)}B re-seated, no second copy")
    if report.code_bytes:
        codes, weights = size(report.code_bytes), size(report.coded_bytes)
        lines.append(f"rounded weights: {codes}B of codes and scales are read, beside the stock model's own {weights}B")
    if report.seconds:
        lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items()))
    for line in lines:
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="    ")
    if report.streamed_weights is not None:
        yield from _streams(report.streamed_weights, _weights(report.streamed_weights))
    if report.streamed_cache is not None:
        yield from _streams(report.streamed_cache, _cache(report.streamed_cache))


def _arena(graphs: Sequence[ArenaUse]) -> str:
    pieces = [piece for graph in graphs for piece in graph.placed]
    arena, least = max(graph.arena for graph in graphs), max(graph.lower_bound for graph in graphs)
    ratio = f", {arena / least:.3f} of the least that is possible" if least else ""
    return (
        f"one arena: {size(arena)}B{ratio}, for {sum(len(piece.buffers) for piece in pieces)} buffers in {len(pieces)} "
        f"pieces of code; besides, up to {size(max(graph.handed_on for graph in graphs))}B that pieces hand on"
    )


def _weights(use: WeightUse) -> str:
    placed = use.placement
    own = f", {size(use.in_place)}B of them in the model's own files" if use.in_place else ""
    return (
        f"weights: {len(placed.offloaded)} of {len(placed.sizes)} layers are streamed from {use.where} "
        f"({size(placed.moved)}B a step{own}) through {placed.slots} slots of {size(placed.slot_bytes)}B; weights take "
        f"{size(placed.device_bytes)}B"
    )


def _cache(use: CacheUse) -> str:
    placed = use.placement
    if not placed.offloaded:
        return (
            f"cache: all {len(placed.sizes)} layers of one sequence fit into the budget, in {size(sum(placed.sizes))}B"
        )
    return (
        f"cache: {len(placed.offloaded)} of {len(placed.sizes)} layers are streamed from {use.where} "
        f"({size(use.row_bytes)}B for each filled row) through {placed.slots} slots of {size(placed.slot_bytes)}B; the "
        f"cache of one sequence takes {size(placed.device_bytes)}B, and {size(placed.moved)}B there"
    )


def _streams(use: StreamUse, headline: str) -> Iterator[str]:
    yield from textwrap.wrap(headline, WIDTH, subsequent_indent="    ")
    yield from (f"    {line}" for line in use.schedule)
    if use.predicted is not None:
        found = use.predicted
        sentence = (
            f"a decode step, predicted at {use.bandwidth / 2**30:.2f} GiB/s with {use.context} rows filled: "
            f"{_ms(found.step)}, {_ms(found.exposed)} of it waiting, {_ms(found.hidden)} of copying hidden"
        )
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="    ", subsequent_indent="        ")
    if use.device != "cpu":
        sentence = (
            f"on {use.device} decode steps are launched piece by piece, not recorded as a CUDA graph: a ring decides "
            "in every step anew what is copied where"
        )
        yield from textwrap.wrap(sentence, WIDTH, initial_indent="    ", subsequent_indent="        ")
    for kind, steps in use.measured.items():
        each = _ms(steps.seconds / steps.count), _ms(steps.exposed / steps.count)
        yield f"    {kind}, measured over {steps.count} steps: {each[0]}, {each[1]} of it waiting"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _told(stage: Outcome) -> list[Spot]:
    """What was refused, and what nearly matched if anything is missing."""
    return stage.refused + ([] if stage.is_complete else stage.near)


def _left_alone(stage: Outcome) -> Iterator[str]:
    """Equal reasons once, with the layers; a dropped pass and one that found nothing say so."""
    lines = []
    if stage.dropped:
        lines.append(f"  {stage.name}: dropped, {stage.dropped}")
    elif not stage.is_complete:
        why = "" if _told(stage) else "; nothing like it was found"
        lines.append(f"  {stage.name}: matched {stage.matched} of {stage.expected}{why}")
    for alike in _by_reason(_told(stage)):
        first = alike[0]
        layers = [spot.layer for spot in alike if spot.layer is not None]
        where = f"layers {ranges(layers)}" if len(layers) > 1 else f"layer {layers[0]}" if layers else "no layer"
        more = f" ({len(alike)} alike)" if len(alike) > 1 else ""
        lines.append(f"  {stage.name}, {where}, {first.source}{more}: {first.reason}")
    for line in lines:
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="      ")


def _by_reason(spots: list[Spot]) -> list[list[Spot]]:
    """Places with the same reason but for the numbers that tell one layer from the next."""
    groups: dict[str, list[Spot]] = {}
    for spot in spots:
        groups.setdefault(re.sub(r"_?\d+", "", spot.reason), []).append(spot)
    return list(groups.values())
