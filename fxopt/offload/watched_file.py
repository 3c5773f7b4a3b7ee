"""A file that is read piece by piece for a long time, and must stay as it was when it was opened."""

from __future__ import annotations

import os
from pathlib import Path

from fxopt.offload.errors import StoreError

PART = 8 << 20  # bytes of one read


class WatchedFile:
    """An open file. Nobody may cut it short or write to it without :meth:`renew`."""

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        except OSError as error:
            raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
        self._seen = self._stamp()

    @property
    def size(self) -> int:
        return self._seen[0]

    def renew(self) -> None:
        """Take it as it is now."""
        self._seen = self._stamp()

    def check(self) -> None:
        """Raise a sentence if the file is not what it was."""
        now = self._stamp()
        if now[0] != self.size:
            raise StoreError(f"{self.path} had {self.size:,} bytes and has {now[0]:,} now; {_AGAIN}")
        if now != self._seen:
            raise StoreError(
                f"{self.path} was written to while weights were read from it, by another process or through "
                f"parameter.data; {_AGAIN}"
            )

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` with what lies at ``offset``, and do not count on the system to keep it in memory."""
        done = 0
        while done < len(target):
            try:
                got = os.preadv(self.fd, [target[done : done + PART]], offset + done)
            except OSError as error:
                raise StoreError(f"{self.path} cannot be read at byte {offset + done:,}: {error.strerror}") from error
            if got == 0:
                raise StoreError(f"{self.path} ends at byte {offset + done:,}, in the middle of a layer; {_AGAIN}")
            done += got
        forget(self.fd, offset, len(target))
        self.check()  # afterwards: what was read must not be half old and half new

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns


def forget(fd: int, offset: int, nbytes: int) -> None:
    """Say that this part of a file need not stay in the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


_AGAIN = "what is streamed is no longer what was moved there. Load the model and call fxopt.optimize again"
