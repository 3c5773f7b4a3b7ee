"""Dataclasses as JSON and back, checked field by field: nothing but plain data can come out."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from fxopt.errors import ArtifactError

T = TypeVar("T")

LONGEST_JSON = 2**28  # bytes of one file; that of a model with 100 layers is a few million

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


def to_plain(value: Any) -> Any:
    """A value as what JSON can say. A float that is no number goes as its name, all others exactly."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON has no words for")


def from_plain(kind: Any, data: Any, where: str) -> Any:
    """A value of type ``kind``, or a sentence that says where ``data`` is something else."""
    origin = get_origin(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        others = [one for one in get_args(kind) if one is not type(None)]
        return None if data is None and len(others) < len(get_args(kind)) else from_plain(others[0], data, where)
    if origin is Literal:
        return data if data in get_args(kind) else wrong(where, f"one of {get_args(kind)}", data)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, data, where)
    if origin in (list, tuple):
        items = expect(list, data, where)
        return origin(from_plain(get_args(kind)[0], item, f"{where}[{place}]") for place, item in enumerate(items))
    if origin in (dict, Mapping):
        table = expect(dict, data, where)
        return {key: from_plain(get_args(kind)[1], item, f"{where}.{key}") for key, item in table.items()}
    if kind is float:
        return _number(data, where)
    if kind is torch.dtype:
        return dtype_of(data, where)
    if kind is torch.device:
        return device_of(data, where)
    return expect(kind, data, where)


def expect(kind: type[T], data: Any, where: str) -> T:
    """``data`` if it is of this plain type."""
    if type(data) is not kind:
        wrong(where, _WORDS.get(kind, "a table"), data)
    return data  # type: ignore[no-any-return]


def wrong(where: str, wanted: str, data: Any) -> Any:
    raise ArtifactError(f"{where} should be {wanted}, and is {repr(data)[:60]}; the file is damaged or was edited")


def dtype_of(data: Any, where: str) -> torch.dtype:
    name = expect(str, data, where)
    return DTYPES[name] if name in DTYPES else wrong(where, "a dtype", data)


def device_of(data: Any, where: str) -> torch.device:
    name = expect(str, data, where)
    return torch.device(name) if _DEVICE.fullmatch(name) else wrong(where, "a device", data)


def to_json(data: Any) -> bytes:
    return json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True).encode()


def from_json(content: bytes, where: str) -> Any:
    """Parse a file that anybody may have written."""
    if len(content) > LONGEST_JSON:
        raise ArtifactError(f"{where} has {len(content):,} bytes of JSON, and at most {LONGEST_JSON:,} are read")
    try:
        return json.loads(content)
    except RecursionError:
        raise ArtifactError(f"{where} is nested too deeply to be read; the file is damaged or was edited") from None
    except ValueError as error:  # broken UTF-8, broken JSON, or a number of thousands of digits
        raise ArtifactError(f"{where} is no JSON ({error}); the file is damaged or was edited") from None


def _record(kind: type[T], data: Any, where: str) -> T:
    table = expect(dict, data, where)
    hints = get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if table.keys() != names:
        odd = sorted(map(str, table.keys() ^ names))[0]
        wrong(where, f"a table {'with' if odd in names else 'without'} {odd!r}", sorted(map(str, table)))
    return kind(**{name: from_plain(hints[name], table[name], f"{where}.{name}") for name in names})


def _number(data: Any, where: str) -> float:
    if isinstance(data, dict) and len(data) == 1 and data.get("float") in ("inf", "-inf", "nan"):
        return float(data["float"])
    if isinstance(data, bool) or not isinstance(data, (int, float)):
        wrong(where, "a number", data)
    return data  # type: ignore[no-any-return]
