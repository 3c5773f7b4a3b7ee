"""Weights and files: the bytes of a tensor, tensors that lie in a file, and in which file one lies already."""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fxopt.offload.watched_file import WatchedFile

#: What safetensors calls the dtypes of weights.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

PART = 16 << 20  # bytes that are compared at once


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they lie."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def mapped(path: Path, nbytes: int, *, shared: bool) -> torch.UntypedStorage:
    """A file as memory. ``shared``: what is written there is written to the file."""
    return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), shared, nbytes))


def seat(parameter: Tensor, storage: torch.UntypedStorage, offset: int) -> None:
    """Let a parameter lie there from now on; what it had is let go of."""
    empty = torch.empty(0, dtype=parameter.dtype)
    parameter.data = empty.set_(storage, offset // parameter.dtype.itemsize, parameter.shape, parameter.stride())


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    offset: int
    path: str


class FilesInMemory:
    """What Linux says of the files that this process has mapped; nothing is known elsewhere."""

    def __init__(self, maps: Path = Path("/proc/self/maps")) -> None:
        try:
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        fields = [line.split(maxsplit=5) for line in lines if line.endswith(".safetensors")]
        self._mappings = sorted((_mapping(each) for each in fields), key=lambda each: each.start)
        self._starts = [each.start for each in self._mappings]
        self._files: dict[str, WatchedFile | None] = {}
        self._same: set[int] = set()  # addresses of tensors that their files hold

    @classmethod
    def none(cls) -> FilesInMemory:
        """As if there were none."""
        return cls(Path(os.devnull))

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a mapped file."""
        if tensor.device.type != "cpu":
            return False
        found = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        return found >= 0 and tensor.data_ptr() + tensor.nbytes <= self._mappings[found].end

    def place_of(self, tensor: Tensor) -> tuple[WatchedFile, int] | None:
        """The file in which a tensor lies and its offset there, if the file still holds the same bytes."""
        if not self.has(tensor):
            return None
        mapping = self._mappings[bisect.bisect_right(self._starts, tensor.data_ptr()) - 1]
        offset = mapping.offset + tensor.data_ptr() - mapping.start
        file = self._opened(mapping.path)
        if file is None or offset % tensor.dtype.itemsize or not holds(file, offset, tensor):
            return None
        self._same.add(tensor.data_ptr())
        return file, offset

    def drop(self, tensor: Tensor) -> None:
        """Let go of the memory under a tensor that its file holds: whoever looks there again reads the file."""
        page = mmap.PAGESIZE
        start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
        if tensor.data_ptr() in self._same and start < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    def place_of_all(self, tensors: Sequence[Tensor]) -> tuple[WatchedFile, int] | None:
        """The same for tensors that lie behind each other, without a gap."""
        first, *others = [self.place_of(tensor) for tensor in tensors]
        ends = itertools.accumulate((tensor.nbytes for tensor in tensors[:-1]), initial=0)
        if first is None or others != [(first[0], first[1] + end) for end in list(ends)[1:]]:
            return None
        return first

    def close(self, but: set[WatchedFile]) -> None:
        """Let go of the files, but for some."""
        for file in self._files.values():
            if file is not None and file not in but:
                file.close()

    def _opened(self, path: str) -> WatchedFile | None:
        if path not in self._files:
            try:
                self._files[path] = WatchedFile(Path(path))
            except OSError:
                self._files[path] = None
        return self._files[path]


def holds(file: WatchedFile, offset: int, tensor: Tensor) -> bool:
    """Whether a file has the bytes of a tensor at an offset."""
    if offset + tensor.nbytes > file.size:
        return False
    buffer = torch.empty(min(PART, tensor.nbytes), dtype=torch.uint8)
    data = tensor.detach().reshape(-1).view(torch.uint8)
    for start in range(0, tensor.nbytes, PART):
        part = data[start : start + PART]
        read = buffer[: part.nbytes]
        file.read_into(raw(read), offset + start)
        if not torch.equal(read, part):
            return False
    return True


def _mapping(fields: list[str]) -> _Mapping:
    start, end = (int(text, 16) for text in fields[0].split("-"))
    return _Mapping(start, end, int(fields[2], 16), fields[5])
