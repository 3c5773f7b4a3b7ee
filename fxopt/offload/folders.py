"""Private folders for weights on disk, gone when their process is, however it ended.

A folder is 0700 and holds a lock file that its process keeps locked. The kernel lets go of the lock
when the process dies, so whoever comes next can tell a stray folder from one in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from fxopt.offload.errors import StoreError

PREFIX = "fxopt-offload-"
LOCK = "lock"
YOUNG = 60.0  # seconds; a folder without a lock may be one that is just being made
IN_MEMORY = ("tmpfs", "ramfs")


class PrivateFolder:
    """A new folder that only this user can look into; removed by :meth:`remove`, with this object, or at exit."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = default_parent() if parent is None else parent
        try:
            remove_strays(parent)
            self.path, lock = _locked(parent)
        except OSError as error:
            raise StoreError(
                f"weights cannot be put into {parent} ({error.strerror or error}); give a folder that can be written "
                'to and has room for them: passes={"offload_weights": {"folder": …}}'
            ) from error
        self.remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())


def default_parent() -> Path:
    """The folder for temporary files, unless what lies there lies in memory."""
    found = Path(tempfile.gettempdir())
    disk = Path("/var/tmp")
    return disk if _kind_of(found) in IN_MEMORY and disk.is_dir() and _kind_of(disk) not in IN_MEMORY else found


def remove_strays(parent: Path) -> list[Path]:
    """Remove the folders of processes that are gone; returns them."""
    return [folder for folder in _ours(parent) if _is_stray(folder) and _removed(folder)]


def _ours(parent: Path) -> Iterator[Path]:
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else may be removing it
            if folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
                yield folder


def _is_stray(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            return time.time() - folder.stat().st_mtime > YOUNG
        return False
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _locked(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, lock
        except BlockingIOError:  # taken for a stray between the two lines above
            os.close(lock)


def _remove(folder: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child ends, and its parent goes on
        return
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _kind_of(path: Path) -> str:
    """The type of the file system that a path is on, if the system says."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    place, best, kind = path.resolve(), Path(), ""
    for line in lines:
        _, point, found, *_ = line.split(" ")
        mounted = Path(point)
        if place.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, found
    return kind
