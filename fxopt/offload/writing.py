"""Weights written to a file in the safetensors format, layer after layer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxopt.offload.amounts import told
from fxopt.offload.errors import StoreError
from fxopt.offload.reading import forget

ALIGN = 64  # where a weight or a group begins
PART = 16 << 20  # bytes of one write


@dataclass(frozen=True)
class Weight:
    """One weight to be written: what safetensors says of it, and its bytes."""

    name: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], memoryview]


Group = Sequence[Weight]  # weights without a gap between them


@dataclass(frozen=True)
class Written:
    """Where things are in the file."""

    header: bytes
    weights: dict[str, int]  # offset of each
    blocks: tuple[tuple[int, int], ...]  # of each layer: where it begins and how long it is
    nbytes: int


def arrange(layers: Sequence[Sequence[Group]]) -> Written:
    """Offsets for all weights. Gaps are weights called ``gap``: the format allows no holes."""
    entries: dict[str, dict[str, object]] = {}
    places: dict[str, int] = {}
    blocks = []
    end = 0

    def put(name: str, dtype: str, shape: Sequence[int], nbytes: int) -> None:
        nonlocal end
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        places[name] = end
        end += nbytes

    for groups in layers:
        start = end
        for group in groups:
            for weight in group:
                put(weight.name, weight.dtype, weight.shape, weight.nbytes)
            if gap := -end % ALIGN:
                put(f"gap.{end}", "U8", (gap,), gap)
        blocks.append((start, end - start))
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    weights = {name: len(header) + place for name, place in places.items() if not name.startswith("gap.")}
    shifted = tuple((len(header) + start, length) for start, length in blocks)
    return Written(header, weights, shifted, len(header) + end)


def write(fd: int, where: Path, layers: Sequence[Sequence[Group]]) -> Written:
    """Write everything to an open file. ``where`` is for sentences, and to ask how much room there is."""
    made = arrange(layers)
    room = shutil.disk_usage(where).free if where.is_dir() else made.nbytes
    if room < made.nbytes:
        raise StoreError(_full(where, made, f"{told(room)} are free"))
    done = 0
    try:
        for piece in _pieces(made, layers):
            while piece:
                part = os.write(fd, piece[:PART])
                piece, done = piece[part:], done + part
        os.fdatasync(fd)
        forget(fd, 0, done)
    except OSError as error:
        raise StoreError(_full(where, made, f"after {told(done)} the system said: {error.strerror}")) from error
    return made


def _pieces(made: Written, layers: Sequence[Sequence[Group]]) -> Iterator[memoryview]:
    yield memoryview(made.header)
    end = len(made.header)
    for groups in layers:
        for group in groups:
            for weight in group:
                yield weight.read()
                end += weight.nbytes
            if gap := -end % ALIGN:
                yield memoryview(bytes(gap))
                end += gap


def _full(where: Path, made: Written, why: str) -> str:
    return (
        f"{told(made.nbytes)} of weights could not be written to {where}: {why}. Make room, or give another folder: "
        'passes={"offload_weights": {"folder": …}}; the model is as it was'
    )
