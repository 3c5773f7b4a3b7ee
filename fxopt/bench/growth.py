"""How costs grow: settings along one axis each, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxopt.bench.chart import Panel
from fxopt.bench.figures import Figures
from fxopt.bench.pictures import lines
from fxopt.bench.results import Results
from fxopt.bench.series import Series
from fxopt.bench.setting import Setting

LONGEST = 8192  # where the model can do as many
DEPTHS = (4, 8, 16, 32)
BATCHES = (1, 2, 4, 8)
NEW = 16
NAMES = ("max-len", "filled", "depth", "batch")


@dataclass(frozen=True)
class Axis:
    """One size that grows while the others stay, and what is looked at."""

    name: str
    title: str
    size: str  # of a Setting
    x: str
    y: str
    value: Callable[[Figures], float | None]
    settings: tuple[Setting, ...]

    @property
    def series(self) -> Series:
        return Series(self.settings, self.name)

    @property
    def is_about_getting_ready(self) -> bool:
        """Which happens once, and not in every round."""
        return self.value is _ready

    def panel(self, results: Results) -> Panel:
        return Panel(self.title, self.x, self.y, lines(self.figures(results), self.size, self.value))

    def figures(self, results: Results) -> list[Figures]:
        return [one for one in results.figures if one.axis == self.name]

    def size_of(self, setting: Setting) -> int:
        return int(getattr(setting, self.size))


def axes(most_positions: int | None) -> tuple[Axis, ...]:
    """In the order of ``NAMES``, for a model that can do so many positions."""
    longest = min(LONGEST, most_positions or LONGEST)
    short, middle = longest // 16, longest // 4
    prompt = short // 4
    return (
        Axis(
            "max-len",
            f"Longer caches, {prompt} tokens filled",
            "max_len",
            "max_len",
            "ms/token",
            _step,
            tuple(Setting(1, prompt, NEW, length) for length in (short, middle, longest)),
        ),
        Axis(
            "filled",
            f"Fuller caches, max_len {middle}",
            "prompt",
            "tokens in the cache",
            "ms/token",
            _step,
            tuple(Setting(1, filled, NEW, middle) for filled in (prompt, middle // 4, middle // 2, middle * 7 // 8)),
        ),
        Axis(
            "depth",
            "Deeper models: until the first answer",
            "layers",
            "layers",
            "s",
            _ready,
            tuple(Setting(1, prompt, 2, short, layers) for layers in DEPTHS),
        ),
        Axis(
            "batch",
            f"More sequences, {prompt} tokens each",
            "batch",
            "sequences",
            "ms for a token of each",
            _step,
            tuple(Setting(batch, prompt, NEW, short) for batch in BATCHES),
        ),
    )


def _step(one: Figures) -> float | None:
    return one.token_ms


def _ready(one: Figures) -> float | None:
    return one.ready_s if one.rounds else None
