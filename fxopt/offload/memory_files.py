"""Files that lie in memory and have no name."""

from __future__ import annotations

import os

from fxopt.errors import InvalidRequestError


def memory_file(name: str) -> int:
    """The descriptor of a new one; ``name`` is for whoever looks at the process."""
    if not hasattr(os, "memfd_create"):
        raise InvalidRequestError('store="cpu" needs files in memory, which Linux has; use store="disk"')
    return os.memfd_create(name, os.MFD_CLOEXEC)
