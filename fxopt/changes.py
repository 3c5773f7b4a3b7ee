"""What a pass changed, layer by layer, with layers that changed alike told once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import starmap, zip_longest

from fxopt.listing import Line, Listing


@dataclass(frozen=True)
class Row:
    """Lines that face each other: equal, replaced, gone (no ``after``) or new (no ``before``)."""

    before: Line | None
    after: Line | None

    @property
    def is_changed(self) -> bool:
        return self.before is None or self.after is None or self.before.text != self.after.text


@dataclass(frozen=True)
class Group:
    """Layers that look alike before and after; ``rows`` are those of the first."""

    layers: tuple[int | None, ...]
    rows: tuple[Row, ...]
    names: tuple[tuple[str, ...], ...]  # for every layer, the names in the order in which ``rows`` has them

    @property
    def is_changed(self) -> bool:
        return any(row.is_changed for row in self.rows)

    @property
    def title(self) -> str:
        first = self.layers[0]
        if first is None:
            return "outside the layers"
        if len(self.layers) == 1:
            return f"layer {first}"
        return f"layers {ranges([layer for layer in self.layers if layer is not None])} (x{len(self.layers)} alike)"


def changes(before: Listing, after: Listing) -> list[Group]:
    """Both graphs side by side, in the order in which the first of each group of layers occurs."""
    groups: dict[tuple[object, ...], list[tuple[int | None, tuple[Row, ...], tuple[str, ...]]]] = {}
    for layer in dict.fromkeys(line.layer for line in (*before, *after)):
        rows = tuple(_rows(_of(before, layer), _of(after, layer)))
        shape, names = _pattern(rows)
        groups.setdefault((layer is None, *shape), []).append((layer, rows, names))
    return [
        Group(tuple(layer for layer, _, _ in alike), alike[0][1], tuple(names for _, _, names in alike))
        for alike in groups.values()
    ]


def unified(groups: list[Group], context: int = 2) -> str:
    """The changed regions as text: ``-`` goes, ``+`` comes."""
    lines: list[str] = []
    for group in groups:
        if group.is_changed:
            lines += [f"@@ {group.title} @@", *_marked(group.rows, context), ""]
    return "\n".join(lines)


def _of(listing: Listing, layer: int | None) -> list[Line]:
    return [line for line in listing if line.layer == layer]


def _rows(before: list[Line], after: list[Line]) -> Iterator[Row]:
    """Equal lines face each other; among the others, those that were only changed and kept their name."""
    for equal, left, right in _blocks(before, after, lambda line: line.text):
        if equal:
            yield from map(Row, left, right)
        else:
            for _, old, new in _blocks(left, right, lambda line: line.name):
                yield from starmap(Row, zip_longest(old, new))


def _blocks(
    before: list[Line], after: list[Line], key: Callable[[Line], str]
) -> Iterator[tuple[bool, list[Line], list[Line]]]:
    """Stretches that are equal in ``key`` on both sides, and those that are not."""
    matcher = difflib.SequenceMatcher(None, list(map(key, before)), list(map(key, after)), autojunk=False)
    for kind, old, old_end, new, new_end in matcher.get_opcodes():
        yield kind == "equal", before[old:old_end], after[new:new_end]


def _pattern(rows: tuple[Row, ...]) -> tuple[tuple[object, ...], tuple[str, ...]]:
    """The rows with every name replaced by the number of its first occurrence, and the names."""
    numbers: dict[str, int] = {}

    def numbered(line: Line | None) -> object:
        if line is None:
            return None
        names = tuple(numbers.setdefault(name, len(numbers)) for name in line.names)
        return line.template, line.value, line.source, line.made_by, names

    return tuple((numbered(row.before), numbered(row.after)) for row in rows), tuple(numbers)


def _marked(rows: tuple[Row, ...], context: int) -> Iterator[str]:
    """Changed rows with a little of what stands around them; gaps are told."""
    changed = [index for index, row in enumerate(rows) if row.is_changed]
    shown = {near for index in changed for near in range(index - context, index + context + 1)}
    gap = False
    pending: list[str] = []  # what comes, kept back until everything that goes beside it is told
    for index, row in enumerate(rows):
        if index not in shown:
            yield from pending
            pending, gap = [], True
            continue
        if gap:
            yield "  …"
            gap = False
        if row.is_changed:
            if row.before is not None:
                yield f"- {row.before.text}"
            if row.after is not None:
                pending.append(f"+ {row.after.text}")
            continue
        yield from pending
        pending = []
        assert row.before is not None
        yield f"  {row.before.text}"
    yield from pending


def ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
