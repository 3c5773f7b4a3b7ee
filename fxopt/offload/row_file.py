"""A file without a name for rows of a cache: nobody else can open it, and it goes with its process."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from fxopt.offload.amounts import told
from fxopt.offload.errors import StoreError
from fxopt.offload.folders import default_parent
from fxopt.offload.memory_files import memory_file
from fxopt.offload.reading import PART, forget, read_whole

LOST = "what this cache held is lost; call generate again, with a new cache"


class RowFile:
    """Room for so many bytes, on disk or in memory. What cannot be written makes all that is read later an error."""

    def __init__(self, nbytes: int, kind: str, folder: Path | None = None) -> None:
        self._file = _nameless(nbytes, kind, folder)
        self.lost: str | None = None

    def read(self, target: memoryview, at: int) -> None:
        self.check()
        read_whole(self.fd, target, at, name="the file with the cache", advice=LOST)

    def write(self, source: memoryview, at: int) -> None:
        done = 0
        try:
            while done < len(source):
                done += os.pwrite(self.fd, source[done:], at + done)
        except OSError as error:
            self.lost = f"rows of the cache could not be written ({error.strerror}); {LOST}"

    def write_zeros(self, at: int, nbytes: int) -> None:
        zeros = memoryview(bytes(min(PART, nbytes)))
        for done in range(0, nbytes, PART):
            self.write(zeros[: nbytes - done], at + done)

    def check(self) -> None:
        """Raise if something could not be written."""
        if self.lost is not None:
            raise StoreError(self.lost)

    def flush(self) -> None:
        """Have everything on the disk, so that memory can forget it."""
        os.fdatasync(self.fd)

    def forget(self, at: int, nbytes: int) -> None:
        forget(self.fd, at, nbytes)

    def close(self) -> None:
        self._file.close()

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    @property
    def fd(self) -> int:
        return self._file.fileno()


def _nameless(nbytes: int, kind: str, folder: Path | None) -> BinaryIO:
    """A file of so many bytes that only this process knows of; there is room for all of them."""
    if kind == "cpu":
        where = "memory"
        file: BinaryIO = os.fdopen(memory_file("fxopt cache"), "r+b", buffering=0)
    else:
        parent = default_parent() if folder is None else folder
        where = str(parent)
        try:
            file = tempfile.TemporaryFile(dir=parent, buffering=0)  # noqa: SIM115 - as long as the store  # type: ignore[assignment]
        except OSError as error:
            raise StoreError(
                f"a cache cannot be put into {parent} ({error.strerror or error}); give a folder that can be written "
                'to and has room for it: passes={"offload_kv": {"folder": …}}'
            ) from error
    try:
        reserve(file.fileno(), nbytes)
    except OSError as error:
        file.close()
        why = "there is no room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "room cannot be reserved"
        raise StoreError(
            f"{why} in {where} for a cache of {told(nbytes)} ({error.strerror}). Make room, give another folder "
            '(passes={"offload_kv": {"folder": …}}), or optimise with a smaller max_len'
        ) from error
    return file


def reserve(fd: int, nbytes: int) -> None:
    """Make a file so long, with room for all of it where the system can promise that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)
