"""Who wrote a folder: compiled code is run if this user saved it, and otherwise if told to.

The key is made once per user and never leaves the machine. It proves nothing to others; it tells
folders that were saved here from folders that came from elsewhere or were edited since.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from fxopt.errors import ArtifactError

KEY_BYTES = 32
_PURPOSE = b"fxopt artifact 1\n"


def sign(content: bytes) -> str:
    """The signature of this user, whose key is made now if there is none."""
    try:
        key = _key() or _new_key()
    except OSError as error:
        raise ArtifactError(
            f"the key that signs saved folders cannot be kept at {key_path()} ({error.strerror}); "
            "name a folder of yours in FXOPT_HOME"
        ) from error
    return _mac(key, content)


def is_mine(content: bytes, signature: str) -> bool:
    """Whether this user signed it. Who has no readable key has signed nothing."""
    try:
        key = _key()
    except OSError:
        return False
    return key is not None and signature.isascii() and hmac.compare_digest(_mac(key, content), signature)


def key_path() -> Path:
    """Where the key of this user lies."""
    if home := os.environ.get("FXOPT_HOME"):
        return Path(home) / "signing.key"
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "fxopt" / "signing.key"


def _mac(key: bytes, content: bytes) -> str:
    return hmac.new(key, _PURPOSE + content, hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    path = key_path()
    try:
        with path.open("rb") as file:
            status, key = os.fstat(file.fileno()), file.read(KEY_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & 0o077):
        raise ArtifactError(
            f"{path} signs compiled code and is open to other users, who could sign as you; "
            f"make it yours alone (chmod 600), or delete it: what you have saved then counts as foreign"
        )
    if len(key) != KEY_BYTES:
        raise ArtifactError(f"{path} holds {len(key)} bytes and no key; delete it, and save your models anew")
    return key


def _new_key() -> bytes:
    """Make a key. Of two processes that do so at once, both go on with the first one's."""
    path = key_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # as a rename would not raise
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    key = _key()
    if key is None:
        raise ArtifactError(f"{path} was deleted while it was made; save again")
    return key
