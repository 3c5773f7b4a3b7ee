"""The catalogue of passes: the built-in ones, those of installed packages, those registered by hand.

A package brings passes along by entry points of the group ``fxopt.passes``, each the name of a
class. Code is loaded from installed packages alone, never from a model's folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

from fxopt.errors import InvalidRequestError, first_line
from fxopt.passes import PASSES
from fxopt.rewrite import Pass, Stage

GROUP = "fxopt.passes"
TAKEN = ("capture", "specialise")  # rows of the report that are no passes

Kind = type[Pass[Any]]
KindT = TypeVar("KindT", bound=Kind)


class Placed(Protocol):
    """What an order needs to know: of a pass, or of a class of passes."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def after(self) -> str | None: ...


PlacedT = TypeVar("PlacedT", bound=Placed)

_changing = threading.Lock()
_registered: dict[str, Kind] = {}

# A module that registers a pass may be imported by one thread while another loads the entry points:
# with one lock for both, each would wait for what the other holds.
_loading = threading.RLock()
_installed: dict[str, Kind] | None = None


def register(kind: KindT) -> KindT:
    """Add a class of passes to the catalogue, and so to what ``optimize`` applies by default.

    It serves as a decorator, above ``@dataclass(frozen=True)``. A class that is defined again, as
    notebooks do, replaces the former one.
    """
    if (reason := _why_not(kind)) is not None:
        raise InvalidRequestError(f"{reason}, and so it cannot be registered")
    with _changing:
        renewed = (kind if _is_former(other, kind) else other for other in _registered.values())
        registered = {one.name: one for one in renewed}
        taken = {**{one.name: one for one in PASSES}, **(_installed or {}), **registered}
        if (other := taken.get(kind.name)) is not None and not _is_former(other, kind):
            raise InvalidRequestError(
                f"{_path(kind)} is named {kind.name!r}, and so is {_path(other)}; give it a name of its own"
            )
        _registered.clear()
        _registered.update({**registered, kind.name: kind})
    return kind


def unregister(name: str) -> None:
    """Take out a pass that ``register`` has added."""
    with _changing:
        if name not in _registered:
            raise InvalidRequestError(
                f"no pass named {name!r} was registered{_near(name, _registered)}. Any pass that is not needed can "
                f"be left out: passes={{{name!r}: False}}"
            )
        del _registered[name]


def catalogue() -> tuple[Kind, ...]:
    """Every pass there is, in the order in which they are applied."""
    installed = _installed_kinds()
    with _changing:
        kinds = {**{kind.name: kind for kind in PASSES}, **installed, **_registered}
    return ordered(kinds.values())


def ordered(passes: Iterable[PlacedT]) -> tuple[PlacedT, ...]:
    """Passes, or classes of them, in the order of application.

    Those of the symbolic graph come first. Each goes right behind the one that it names in ``after``
    and what already stands there, or else behind all of its stage.
    """
    passes = tuple(passes)
    followers: dict[str | None, list[PlacedT]] = defaultdict(list)
    for one in passes:
        followers[one.after].append(one)

    def chain(name: str | None) -> list[PlacedT]:
        return [late for one in followers[name] for late in (one, *chain(one.name))]

    placed = chain(None)
    _check_order(passes, {one.name for one in placed})
    return tuple(one for stage in Stage for one in placed if one.stage is stage)


def _check_order(passes: tuple[Placed, ...], placed: set[str]) -> None:
    known = {one.name: one for one in passes}
    for one in passes:
        if one.after is None:
            continue
        if one.after not in known:
            hint = _near(one.after, known) or "; register it as well, or name another"
            raise InvalidRequestError(f"{one.name} is to go behind {one.after!r}, and there is no such pass{hint}")
        if one.stage is not known[one.after].stage:
            raise InvalidRequestError(
                f"{one.name} is to go behind {one.after}, but it rewrites the {one.stage.value} graph and {one.after} "
                f"the {known[one.after].stage.value} one; let it name a pass of its own stage, or none"
            )
    if circle := [f"{one.name} behind {one.after}" for one in passes if one.name not in placed]:
        raise InvalidRequestError(f"these passes stand in a circle: {', '.join(circle)}; let one of them name no other")


def _why_not(kind: Any) -> str | None:
    """What keeps a thing from being a class of passes for the catalogue, or None."""
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        return f"{kind!r} is no subclass of fxopt.Pass"
    name, summary = getattr(kind, "name", None), getattr(kind, "summary", None)
    if not isinstance(name, str) or not name.isidentifier():
        return f"{_path(kind)} has name={name!r}, which is no identifier such as 'fuse_qkv'"
    if name in TAKEN:
        return f"{_path(kind)} has name={name!r}, which stands for something else in the report"
    if not isinstance(summary, str) or not summary:
        return f"{_path(kind)} has summary={summary!r}, where a line for the report is needed"
    if not isinstance(kind.stage, Stage):
        return f"{_path(kind)} has stage={kind.stage!r}, which is none of fxopt.Stage"
    if kind.stage is Stage.CODE and kind not in PASSES:
        return f"{_path(kind)} has stage={kind.stage!r}; the passes that tell the compiler what to do are fxopt's own"
    if not isinstance(kind.by_default, bool):
        return f"{_path(kind)} has by_default={kind.by_default!r}, where True or False is needed"
    if not (kind.after is None or isinstance(kind.after, str)):
        return f"{_path(kind)} has after={kind.after!r}, where the name of a pass is needed"
    if not dataclasses.is_dataclass(kind):
        return f"{_path(kind)} is no dataclass (@dataclass(frozen=True) goes below @register)"
    try:
        kind()
    except Exception as error:
        return f"{_path(kind)} cannot be made without arguments ({first_line(error)})"
    return None


def _is_former(other: Kind, kind: Kind) -> bool:
    """Whether ``other`` is an earlier definition of the same class, perhaps under another name."""
    if _path(other) != _path(kind):
        return False
    # A function may make many classes at one place, each with a name of its own.
    return other.name == kind.name or "<locals>" not in kind.__qualname__


def _path(kind: Kind) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _installed_kinds() -> dict[str, Kind]:
    """The passes of installed packages, loaded when they are first asked for."""
    global _installed
    with _loading:
        if _installed is None:
            _installed = {}  # for a package that asks for the catalogue while it is being loaded
            entries = sorted(entry_points(group=GROUP), key=lambda entry: (_origin(entry), entry.name))
            _installed, left = _fitting(entries)
            for entry, complaint in left:
                _warn(entry, complaint)
        return _installed


def _fitting(entries: Iterable[EntryPoint]) -> tuple[dict[str, Kind], list[tuple[EntryPoint, str]]]:
    """The classes that entry points lead to, and what is against those that cannot be used."""
    found: dict[str, Kind] = {}
    waiting = list(entries)
    while True:
        left: list[tuple[EntryPoint, str]] = []
        for entry in waiting:
            try:
                kind = _loaded(entry, found)
            except InvalidRequestError as error:
                left.append((entry, str(error)))
            else:
                found[kind.name] = kind
        if len(left) == len(waiting):
            return found, left
        waiting = [entry for entry, _ in left]  # one may go behind another that has been found since


def _loaded(entry: EntryPoint, found: dict[str, Kind]) -> Kind:
    """The class that an entry point leads to, if it may join the built-in ones and those found so far."""
    try:
        kind = entry.load()
    except Exception as error:
        raise InvalidRequestError(f"it fails to load, {type(error).__name__}: {first_line(error)}") from error
    if (reason := _why_not(kind)) is not None:
        raise InvalidRequestError(reason)
    with _changing:
        taken = {**_registered, **{one.name: one for one in PASSES}, **found}
    if (other := taken.get(kind.name, kind)) is not kind:
        raise InvalidRequestError(f"{_path(other)} is named {kind.name!r} too")
    joined: Kind = kind
    ordered([*PASSES, *found.values(), joined])
    return joined


def _warn(entry: EntryPoint, complaint: str) -> None:
    warnings.warn(
        f"the package {_origin(entry)} brings a pass, {entry.value}, that cannot be used: {complaint}; "
        "fxopt goes on without it",
        stacklevel=4,
    )


def _origin(entry: EntryPoint) -> str:
    """The distribution that an entry point comes with."""
    return entry.dist.name if entry.dist is not None else "(unknown)"
