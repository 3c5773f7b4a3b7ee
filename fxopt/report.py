"""What was rewritten, what was refused and why: printable, and as plain data."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from fxopt.in_place import InPlaceProof
from fxopt.rewrite import Outcome, Refusal

SCHEMA = 1
WIDTH = 100  # columns


@dataclass
class Check:
    """One comparison with the stock model: the worst error seen and what was allowed."""

    what: str
    error: float
    allowed: float


@dataclass
class Report:
    """The outcome of one ``optimize``."""

    model: str
    backend: str
    max_len: int
    passes: list[Outcome] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    proofs: dict[str, InPlaceProof] = field(default_factory=dict)
    packed_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        proofs = {name: {**asdict(proof), "holds": proof.holds} for name, proof in self.proofs.items()}
        return {"schema": SCHEMA, **asdict(self), "proofs": proofs}

    def __str__(self) -> str:
        lines = [f"{self.model}, max_len {self.max_len}, backend {self.backend}", "", self._table()]
        refusals = [line for outcome in self.passes for line in _refusal_lines(outcome)]
        if refusals:
            lines += ["", "Left alone:", *refusals]
        lines += ["", *self._closing_lines()]
        return "\n".join(wrapped for line in lines for wrapped in _wrapped(line))

    def _table(self) -> str:
        rows = [
            [
                outcome.name,
                "" if outcome.expected is None else outcome.expected,
                "dropped" if outcome.dropped else outcome.matched,
                len(outcome.refused) or "",
                f"{outcome.nodes_before} → {outcome.nodes_after}",
                f"{outcome.seconds:.2f}",
            ]
            for outcome in self.passes
        ]
        headers = ["pass", "expected", "matched", "refused", "nodes", "seconds"]
        return tabulate(
            rows, headers=headers, tablefmt="simple", colalign=("left", "right", "right", "right", "right", "right")
        )

    def _closing_lines(self) -> list[str]:
        lines = []
        for check in self.checks:
            lines.append(f"verified {check.what}: largest error {check.error:.1e}, allowed {check.allowed:.1e}")
        for name, proof in self.proofs.items():
            verdict = "no cache-sized copy" if proof.holds else "COPIES A CACHE: " + "; ".join(proof.copies)
            lines.append(f"in place, {name}: {proof.writes} cache writes, {verdict}")
        if self.packed_bytes:
            lines.append(f"packed weights: {self.packed_bytes / 2**20:.1f} MiB re-seated, no second copy")
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()))
        return lines


def _wrapped(line: str) -> list[str]:
    """Sentences folded to the width of a terminal; tables are left as they are."""
    if len(line) <= WIDTH or "\n" in line:
        return [line]
    return textwrap.wrap(line, WIDTH, subsequent_indent="    ")


def _refusal_lines(outcome: Outcome) -> list[str]:
    """Equal reasons once, with how often and where first."""
    lines = [f"  {outcome.name}: dropped, {outcome.dropped}"] if outcome.dropped else []
    for reason, count in Counter(_kind(refusal) for refusal in outcome.refused).items():
        first = next(refusal for refusal in outcome.refused if _kind(refusal) == reason)
        more = f" (and {count - 1} alike)" if count > 1 else ""
        lines.append(f"  {outcome.name} at {first.node}, {first.source}: {first.reason}{more}")
    return lines


def _kind(refusal: Refusal) -> str:
    """The reason without the digits that tell one layer from the next."""
    return "".join(c for c in refusal.reason if not c.isdigit())
