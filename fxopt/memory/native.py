"""The compiled search: built once per user, by the C++ compiler that Inductor needs as well.

    <cache>/search-<key>-<digest>.so    key: of source and compiler; digest: of the file itself

The cache is a folder that nobody else can write to. A library appears in it whole or not at all, and is loaded
only if it is what its name says; two processes that build at once do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

from fxopt.memory.instance import Instance

COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC")
LONGEST_BUILD = 120.0  # seconds; three are usual
SLICE = 0.1  # seconds for which Python does not hear of Ctrl-C

_IMPOSSIBLE, _FOUND, _NOT_YET = range(3)


class NoCompiledSearchError(Exception):
    """Why there is no compiled search on this machine; the one in Python works everywhere."""


class CompiledSearch:
    """As ``PythonSearch``, a hundred times faster."""

    def __init__(self, instance: Instance, capacity: int) -> None:
        self._search: int | None = None
        self._library = library()
        flat = [number for item in instance.items for number in item]
        self.offsets = [0] * len(instance.items)
        array = (ctypes.c_int64 * len(flat))(*flat)
        self._search = self._library.fxopt_search_new(array, len(instance.items), instance.sections, capacity)
        if not self._search:
            raise MemoryError(f"there is no memory to search a plan for {len(instance.items)} buffers")

    def run(self, steps: int, deadline: float) -> bool | None:
        """Whether there is a plan, or None if that many steps did not show it."""
        answer, left = _NOT_YET, ctypes.c_int64(steps)
        while answer == _NOT_YET and left.value > 0 and (seconds := deadline - time.monotonic()) > 0:
            answer = self._library.fxopt_search_run(self._search, ctypes.byref(left), min(seconds, SLICE))
        if answer > _NOT_YET:
            raise MemoryError("the search for a plan has no memory left")
        if answer == _FOUND:
            array = (ctypes.c_int64 * len(self.offsets))()
            self._library.fxopt_search_offsets(self._search, array)
            self.offsets = list(array)
        return None if answer == _NOT_YET else answer == _FOUND

    def __del__(self) -> None:
        if self._search:
            self._library.fxopt_search_delete(self._search)


def library() -> Any:
    """The compiled search, built now if it was not; or NoCompiledSearchError."""
    outcome = _outcome()
    if isinstance(outcome, str):
        raise NoCompiledSearchError(outcome)
    return outcome


def cache_folder() -> Path:
    """Where compiled code of this user is kept."""
    if home := os.environ.get("FXOPT_HOME"):
        return Path(home) / "compiled"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fxopt"


@functools.cache
def _outcome() -> Any:
    """The library, or why there is none; asked once per process, since a failed build takes seconds as well."""
    try:
        compiler = _compiler()
        source = (resources.files("fxopt.memory") / "search.cpp").read_bytes()
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=10, check=True).stdout
        said = "\n".join([*compiler, *FLAGS, platform.machine()]).encode()
        key = hashlib.sha256(b"\0".join([said, version, source])).hexdigest()[:16]
        folder = _own_folder()
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="fxopt-") as passing:
                return _loaded(_build(compiler, source, Path(passing), key))
        return _loaded(_kept(folder, key) or _build(compiler, source, folder, key))
    except NoCompiledSearchError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the compiled search cannot be built or loaded: {error}"


def _compiler() -> list[str]:
    """The command that the environment names in CXX, or one of the usual ones."""
    if os.name != "posix":
        raise NoCompiledSearchError(f"the search is compiled on POSIX systems, and this one is {os.name}")
    for command in filter(None, map(shlex.split, (os.environ.get("CXX", ""), *COMPILERS))):
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise NoCompiledSearchError(f"there is no C++ compiler; install one ({COMPILERS[0]}), or name yours in CXX")


def _own_folder() -> Path | None:
    """The cache folder, or None if it cannot be written to, or others can write to it."""
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    mine = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if mine and os.access(folder, os.W_OK) else None


def _kept(folder: Path, key: str) -> Path | None:
    """The library that an earlier process built; a damaged one is removed, since loading it could crash."""
    for path in folder.glob(f"search-{key}-*.so"):
        if path.name == _name(key, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def _build(compiler: list[str], source: bytes, folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as work:
        code, draft = Path(work) / "search.cpp", Path(work) / "search.so"
        code.write_bytes(source)
        command = [*compiler, *FLAGS, "-o", str(draft), str(code)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_BUILD, check=False)
        if ran.returncode:
            complaint = next(iter(ran.stderr.strip().splitlines()), f"exit code {ran.returncode}")
            raise NoCompiledSearchError(f"{compiler[0]} cannot compile the search: {complaint}")
        return draft.replace(folder / _name(key, draft.read_bytes()))


def _name(key: str, content: bytes) -> str:
    return f"search-{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _loaded(path: Path) -> Any:
    loaded = ctypes.CDLL(str(path))
    numbers = ctypes.POINTER(ctypes.c_int64)
    loaded.fxopt_search_new.argtypes = [numbers, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    loaded.fxopt_search_new.restype = ctypes.c_void_p
    loaded.fxopt_search_run.argtypes = [ctypes.c_void_p, numbers, ctypes.c_double]
    loaded.fxopt_search_run.restype = ctypes.c_int
    loaded.fxopt_search_offsets.argtypes = [ctypes.c_void_p, numbers]
    loaded.fxopt_search_offsets.restype = None
    loaded.fxopt_search_delete.argtypes = [ctypes.c_void_p]
    loaded.fxopt_search_delete.restype = None
    return loaded
