"""What a report holds: every stage with its places, its graph and its cost, and the checks."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fxopt.changes import Group, changes, unified
from fxopt.errors import InvalidRequestError
from fxopt.in_place import InPlaceProof
from fxopt.offload.use import CacheUse, StreamUse, WeightUse
from fxopt.outcome import Check, Outcome
from fxopt.placement import ArenaUse
from fxopt.timed_forms import TimedForms

SCHEMA = 2  # of to_dict; 2: steps with costs, places by layer, checks per pass
PASS_STAGES = ("symbolic", "decode", "code")


@dataclass
class ReportData:
    """The outcome of one ``optimize`` or ``explain``.

    ``stages`` holds the capture, the passes on the symbolic graph, its specialisation to one token,
    and the passes on that; every stage has the graph it led to and what one decode step costs on it.
    """

    model: str
    backend: str
    max_len: int
    batch: int = 1  # of the decode step that is costed
    context: int = 0  # rows of the cache that are filled in that step
    stages: list[Outcome] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    proofs: dict[str, InPlaceProof] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)  # of the compiled code, by role
    graphs: dict[str, str] = field(default_factory=dict)  # for how many sequences: which are ready
    arenas: dict[str, ArenaUse] = field(default_factory=dict)  # of each compiled graph
    streamed_weights: WeightUse | None = None  # where offload_weights has moved some
    streamed_cache: CacheUse | None = None  # where offload_kv was asked for
    attention: TimedForms | None = None  # of one query, where its forms were timed
    linears: TimedForms | None = None  # of many rows, where libraries were
    packed_bytes: int = 0
    code_bytes: int = 0  # of weights that quantize_weights has rounded
    coded_bytes: int = 0  # of the same weights as the model has them
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> list[Outcome]:
        return [stage for stage in self.stages if stage.stage in PASS_STAGES]

    @property
    def streamed(self) -> dict[str, StreamUse]:
        """What each pass that streams layers came to."""
        both: dict[str, StreamUse | None] = {
            "offload_weights": self.streamed_weights,
            "offload_kv": self.streamed_cache,
        }
        return {name: use for name, use in both.items() if use is not None}

    def __getitem__(self, name: str) -> Outcome:
        """The stage of this name."""
        return self.stages[self._index(name)]

    def before(self, name: str) -> Outcome:
        """The stage that this one started from: the last one in front of it that was kept."""
        earlier = self.stages[: self._index(name)]
        return next((stage for stage in reversed(earlier) if stage.dropped is None), self[name])

    def changes(self, name: str) -> list[Group]:
        """The graphs before and after a stage side by side, layers that look alike told once."""
        after = self[name].listing
        earlier = (stage.listing for stage in reversed(self.stages[: self._index(name)]) if stage.dropped is None)
        return changes(next(filter(None, earlier), after) if after else (), after)

    def diff(self, name: str, context: int = 2) -> str:
        """What a pass changed, as text: ``-`` goes, ``+`` comes."""
        text = unified(self.changes(name), context)
        return text or f"{name} changed nothing\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the graphs themselves are in :meth:`diff` and in the page."""
        data = asdict(self)
        for stage in data["stages"]:
            del stage["listing"]
        for name, proof in self.proofs.items():
            data["proofs"][name]["holds"] = proof.holds
        return {"schema": SCHEMA, **data}

    def to_json(self) -> str:
        return json.dumps(finite(self.to_dict()), indent=2)

    def _index(self, name: str) -> int:
        names = [stage.name for stage in self.stages]
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise InvalidRequestError(f"the report has no pass named {name!r}; {hint}")
        return names.index(name)


def finite(value: Any) -> Any:
    """JSON has no word for inf and nan; they go as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
