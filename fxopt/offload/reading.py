"""Reading a part of a file to its end, and telling the system that it need not be kept in memory."""

from __future__ import annotations

import os

from fxopt.offload.errors import StoreError

PART = 8 << 20  # bytes of one read


def read_whole(fd: int, target: memoryview, offset: int, *, name: str, advice: str) -> None:
    """Fill ``target`` with what lies at ``offset``; ``name`` and ``advice`` are for sentences."""
    done = 0
    while done < len(target):
        try:
            got = os.preadv(fd, [target[done : done + PART]], offset + done)
        except OSError as error:
            raise StoreError(f"{name} cannot be read at byte {offset + done:,}: {error.strerror}") from error
        if got == 0:
            raise StoreError(f"{name} ends at byte {offset + done:,}, in the middle of a layer; {advice}")
        done += got


def forget(fd: int, offset: int, nbytes: int) -> None:
    """Say that this part of a file need not stay in the page cache."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
