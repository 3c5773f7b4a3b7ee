"""A report as one page to look at: everything is inside it, and nothing is loaded from anywhere.

Names, sources and sentences come from the model and are not trusted: they travel as escaped JSON,
and the page's script shows them as text only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from fxopt.arena_pictures import pictures
from fxopt.changes import Group
from fxopt.listing import Line
from fxopt.offload.timeline import draw
from fxopt.offload.use import StreamUse
from fxopt.outcome import Check, Outcome, Spot
from fxopt.report_data import PASS_STAGES, ReportData, finite
from fxopt.report_text import as_text

#: The page's script in reading order; together they are one module, so each may call the others.
SCRIPTS = "data helpers lines state header rail charts panel graph moving card search theme start"
NOTHING = -1  # in the data: no line on this side of a row

_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_SLOT = re.compile(r"\{\{(\w+)\}\}")
#: What could end the script element that holds the data, or a line of JavaScript.
_UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def as_page(report: ReportData) -> str:
    style, script = _static("style.css"), "\n".join(_static(f"{name}.js") for name in SCRIPTS.split())
    drawn = [("plan_memory", picture) for picture in pictures(report.arenas)]
    drawn += [(name, draw(use, f"A decode step: {_WHAT[name]}")) for name, use in report.streamed.items()]
    styles = [style, *dict.fromkeys(found for _, picture in drawn for found in _STYLE.findall(picture))]
    parts = {
        "policy": _policy(styles, script),
        "pictures": "\n".join(
            f'<figure data-stage="{stage}">{picture}</figure>' for stage, picture in drawn if picture
        ),
        "title": html.escape(f"{report.model}, rewritten by fxopt"),
        "style": style,
        "script": script,
        "text": html.escape(as_text(report)),
        "data": _json(_data(report)),
    }
    return _SLOT.sub(lambda slot: parts[slot[1]], _static("template.html"))


def _static(name: str) -> str:
    return (resources.files("fxopt") / "page" / name).read_text(encoding="utf-8")


def _policy(styles: Sequence[str], script: str) -> str:
    """Nothing may run or be loaded but the styles and the one script that are in the page."""
    known = " ".join(f"'{_digest(style)}'" for style in styles)
    return (
        f"default-src 'none'; style-src {known}; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: object) -> str:
    """JSON that may stand inside a script element, whatever it says."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False).translate(_UNSAFE)


def _data(report: ReportData) -> dict[str, Any]:
    tables = _Tables()
    stages = [tables.stage(report, stage) for stage in report.stages]
    return {
        "report": {
            "model": report.model,
            "backend": report.backend,
            "max_len": report.max_len,
            "batch": report.batch,
            "context": report.context,
            "packed_bytes": report.packed_bytes,
            "code_bytes": report.code_bytes,
            "coded_bytes": report.coded_bytes,
            "checks": [asdict(check) for check in report.checks],
            "proofs": [{"name": name, **asdict(proof)} for name, proof in report.proofs.items()],
            "graphs": list(report.graphs.items()),
            "arenas": [
                {"name": name, "arena": use.arena, "lower_bound": use.lower_bound, "handed_on": use.handed_on}
                for name, use in report.arenas.items()
            ],
            "streams": [_stream(name, use) for name, use in report.streamed.items()],
            "launches": list(report.launches.items()),
            "seconds": list(report.seconds.items()),
        },
        "stages": stages,
        "lines": list(tables.lines),
        "strings": list(tables.strings),
    }


#: What a pass streams, and what the device holds of it.
_WHAT = {"offload_weights": "weights", "offload_kv": "the cache of one sequence"}


def _stream(name: str, use: StreamUse) -> dict[str, Any]:
    placed = use.placement
    return {
        "pass": name,
        "what": _WHAT[name],
        "layers": len(placed.sizes),
        "slots": placed.slots,
        "slot_bytes": placed.slot_bytes,
        "device_bytes": placed.device_bytes,
        "moved": use.predicted.moved if use.predicted is not None else None,
        "store": use.where,
    }


class _Numbers(dict[Hashable, int]):
    """Things once each, in the order of their numbers."""

    def of(self, thing: Hashable) -> int:
        return self.setdefault(thing, len(self))


class _Tables:
    """Turns stages into numbers that point into two tables, so that equal text is written once."""

    def __init__(self) -> None:
        self.strings = _Numbers()
        self.lines = _Numbers()  # template, value, source, made by, and which names of its group

    def stage(self, report: ReportData, stage: Outcome) -> dict[str, Any]:
        before = report.before(stage.name)
        return {
            "name": stage.name,
            "kind": stage.stage,
            "summary": stage.summary,
            "state": _state(stage),
            "dropped": stage.dropped,
            "before": report.stages.index(before),
            "expected": stage.expected,
            "matched": stage.matched,
            "nodes": [stage.nodes_before, stage.nodes_after],
            "ops": list(stage.ops.items()),
            "freed_bytes": stage.freed_bytes,
            "seconds": stage.seconds,
            "step": asdict(stage.step) if stage.step is not None else None,
            "verified": _check(stage.verified),
            "sites": self._spots(stage.sites),
            "refused": self._spots(stage.refused),
            "near": self._spots(stage.near),
            "groups": [self._group(group) for group in report.changes(stage.name)],
        }

    def _spots(self, spots: list[Spot]) -> list[list[int | None]]:
        text = self.strings.of
        return [[text(spot.node), text(spot.source), spot.layer, text(spot.reason)] for spot in spots]

    def _group(self, group: Group) -> dict[str, Any]:
        slots = {name: slot for slot, name in enumerate(group.names[0])}
        return {
            "layers": group.layers,
            "changed": group.is_changed,
            "rows": [[self._line(row.before, slots), self._line(row.after, slots)] for row in group.rows],
            "names": [[self.strings.of(name) for name in names] for names in group.names],
        }

    def _line(self, line: Line | None, slots: dict[str, int]) -> int:
        if line is None:
            return NOTHING
        text = self.strings.of
        made_by, names = tuple(map(text, line.made_by)), tuple(slots[name] for name in line.names)
        return self.lines.of((text(line.template), text(line.value), text(line.source), made_by, names))


def _check(check: Check | None) -> dict[str, Any] | None:
    return None if check is None else asdict(check)


def _state(stage: Outcome) -> str:
    if stage.dropped is not None:
        return "dropped"
    if stage.stage not in PASS_STAGES:
        return "start"
    if not stage.is_complete:
        return "incomplete"
    return "complete" if stage.matched else "idle"
