"""YAML of people: no objects, no references, nothing twice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from fxopt.memory.errors import PlanError

LONGEST = 2**26  # characters; the plan of a model with a hundred layers has a million
DEEPEST = 50  # tables in tables; a plan has five

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def write_yaml(document: Mapping[str, Any]) -> str:
    """Plain data as text, small tables on one line."""
    written: str = yaml.dump(dict(document), Dumper=_Plain, sort_keys=False, width=118, allow_unicode=True)
    return written


def read_yaml(text: str) -> dict[str, Any]:
    """The plain data of a text that anybody may have written."""
    if len(text) > LONGEST:
        raise PlanError(f"the text has {len(text):,} characters; at most {LONGEST:,} are read")
    try:
        _check_events(text)
        document = yaml.load(text, Loader=_Once)
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError(f"the text is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise PlanError(f"the text is a {type(document).__name__}, and not a table with a plan in it")
    return document


def _check_events(text: str) -> None:
    """Before anything is built: references to references are gigabytes, and deep nests overflow the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise PlanError("the text refers to itself (& and *); write everything out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise PlanError(f"the text is nested more than {DEEPEST} deep")


class _Once(_Loader):
    """The safe loader, for which a key that is there twice is an error and not the last of the two."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise PlanError(
                    f"{key!r} is no name; the keys of tables are texts, in quotes if they look like numbers"
                )
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise PlanError(f"{twice!r} is there twice in one table; leave one of them out")
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


class _Plain(_Dumper):
    """The safe dumper, which may not say "as above" either."""

    def ignore_aliases(self, data: object) -> bool:
        return True
