"""A file that is read piece by piece for a long time, and must stay as it was when it was opened."""

from __future__ import annotations

import os
from pathlib import Path

from fxopt.offload.errors import StoreError
from fxopt.offload.reading import forget, read_whole


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
        read_whole(self.fd, target, offset, name=str(self.path), advice=_AGAIN)
        forget(self.fd, offset, len(target))
        self.check()  # afterwards: what was read must not be half old and half new

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns


_AGAIN = "what is streamed is no longer what was moved there. Load the model and call fxopt.optimize again"
