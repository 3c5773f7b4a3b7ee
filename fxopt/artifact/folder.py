"""The folder on disk: written so that it is whole at every moment, read so that nothing else gets in.

    folder/fxopt.json        names the sub-folder that counts; replaced in one go
    folder/saved-<number>/   manifest.json, its signature, and the files that the manifest lists

A sub-folder is complete before it is named, and never changed afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.artifact.plain import expect, from_json, from_plain, to_json, wrong
from fxopt.artifact.signature import is_mine, sign
from fxopt.errors import ArtifactError

FORMAT = 1
POINTER, MANIFEST, SIGNATURE = "fxopt.json", "manifest.json", "signature"

AGAIN = "the folder is damaged, and the model has to be saved again"

_SAVED = re.compile(r"saved-[0-9a-f]{16}")
_FILE = re.compile(r"([a-z0-9][a-z0-9-]*/)?[a-z0-9][a-z0-9-]*\.(json|safetensors|pt2)")
_LONGEST = {POINTER: 4096, SIGNATURE: 256, MANIFEST: 2**26}  # bytes; other lengths are in the manifest

_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # neither links nor pipes


@dataclass(frozen=True)
class Entry:
    """A file as the manifest has it."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """What was read: every file is as the manifest says, and ``mine`` says who signed that."""

    manifest: dict[str, Any]
    files: dict[str, bytes]
    mine: bool

    def json(self, name: str) -> Any:
        return from_json(self.file(name), name)

    def file(self, name: str) -> bytes:
        if name not in self.files:
            raise ArtifactError(f"the manifest lists no {name}; {AGAIN}")
        return self.files[name]


def write(folder: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Put a model in place of what the folder held, or into a new folder."""
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    listed = to_json({"format": FORMAT, **manifest, "files": entries})
    contents = {**files, MANIFEST: listed, SIGNATURE: sign(listed).encode()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, shared=False):
            check_target(folder)
            _publish(folder, contents)
    except OSError as error:
        why = f"{folder} cannot be written: {error.strerror}"
        raise ArtifactError(f"{why}; what it held before is still there") from error


def check_target(folder: Path) -> None:
    """Raise a sentence if something else lies at this place."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file; name a folder to save to")
    foreign = [path.name for path in sorted(folder.glob("*")) if not _SAVED.fullmatch(path.name)]
    if foreign and POINTER not in foreign:
        raise ArtifactError(
            f"{folder} holds {foreign[0]} and no saved model; name a new folder, or one that was saved to before"
        )


def read(folder: Path) -> Archive:
    """Every file of the saved model, or a sentence that says which one is not as it was written."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder; name one that fast.fxopt.save has written")
    try:
        with _locked(folder, shared=True):
            return _read(folder)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror} ({error.filename})") from error


def _publish(folder: Path, contents: Mapping[str, bytes]) -> None:
    number = secrets.token_hex(8)
    saved = folder / f"saved-{number}"
    try:
        saved.mkdir()
        for name, content in contents.items():
            path = saved / name
            path.parent.mkdir(exist_ok=True)
            _write_through(path, content)
        for path in [*(path for path in saved.rglob("*") if path.is_dir()), saved, folder]:
            _flush_folder(path)
        draft = saved / POINTER
        _write_through(draft, to_json({"format": FORMAT, "saved": saved.name}))
        draft.replace(folder / POINTER)
        _flush_folder(folder)
    except BaseException:
        if _named(folder) != saved.name:
            shutil.rmtree(saved, ignore_errors=True)
        raise
    for path in folder.iterdir():
        if path != saved and _SAVED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _named(folder: Path) -> str | None:
    try:
        return str(from_json((folder / POINTER).read_bytes(), POINTER)["saved"])
    except Exception:  # only asked whether it names a certain one
        return None


def _read(folder: Path) -> Archive:
    if not (folder / POINTER).exists():
        raise ArtifactError(f"{folder} holds no {POINTER}; name a folder that fast.fxopt.save has written")
    pointer = expect(dict, from_json(_content(folder / POINTER, POINTER), POINTER), POINTER)
    _check_format(pointer, POINTER)
    name = pointer.get("saved")
    if not isinstance(name, str) or not _SAVED.fullmatch(name):
        wrong(f"{POINTER}: saved", "a folder beside it", name)
    saved = folder / str(name)
    if saved.is_symlink() or not saved.is_dir():
        raise ArtifactError(f"{saved} is missing, but {POINTER} names it; {AGAIN}")
    listed = _content(saved / MANIFEST, MANIFEST)
    manifest = expect(dict, from_json(listed, MANIFEST), MANIFEST)
    _check_format(manifest, MANIFEST)
    entries: dict[str, Entry] = from_plain(dict[str, Entry], manifest.get("files"), f"{MANIFEST}: files")
    _check_names(saved, entries)
    files = {name: _checked(saved / name, name, entry) for name, entry in entries.items()}
    signature = _content(saved / SIGNATURE, SIGNATURE).decode("ascii", "replace").strip()
    return Archive(manifest, files, is_mine(listed, signature))


def _check_format(data: dict[str, Any], where: str) -> None:
    if data.get("format") != FORMAT:
        raise ArtifactError(
            f"{where}: format is {repr(data.get('format'))[:40]}, and this fxopt reads {FORMAT}; {AGAIN}"
        )


def _check_names(saved: Path, entries: Mapping[str, Entry]) -> None:
    """Exactly the files that the manifest lists are there, and all of them lie inside."""
    for name in entries:
        if not _FILE.fullmatch(name):
            wrong(f"{MANIFEST}: files", "plain names", name)
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_symlink() or not path.is_dir()}
    wanted = {*entries, MANIFEST, SIGNATURE}
    if missing := sorted(wanted - found):
        raise ArtifactError(f"{missing[0]} is missing; {AGAIN}")
    if strange := sorted(found - wanted):
        raise ArtifactError(f"{strange[0]} is not in the manifest; somebody added it; {AGAIN}")


def _checked(path: Path, name: str, entry: Entry) -> bytes:
    content = _content(path, name, entry.bytes)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ArtifactError(f"{name} is not what was saved (its SHA-256 differs); {AGAIN}")
    return content


def _content(path: Path, name: str, length: int | None = None) -> bytes:
    """A regular file, no link, of a length that was announced or is harmless."""
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        raise ArtifactError(f"{name} is missing; {AGAIN}") from None
    except OSError as error:
        raise ArtifactError(f"{name} cannot be read, or is a link ({error.strerror}); {AGAIN}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if path.parent.is_symlink() or not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{name} is no plain file; {AGAIN}")
        found = status.st_size
        if found != length if length is not None else found > _LONGEST[name]:
            allowed = f"{length:,} were saved" if length is not None else f"at most {_LONGEST[name]:,} make sense"
            raise ArtifactError(f"{name} has {found:,} bytes, and {allowed}; {AGAIN}")
        return file.read(found)


@contextlib.contextmanager
def _locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Hold the folder: one process at a time may publish, and none while another reads. Gone with its process."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where an open file cannot be deleted anyway
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
