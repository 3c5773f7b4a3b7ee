"""Commands that may not take more than so much memory: the kernel kills them if they try."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: Where a group can be made, and what its limit is called: with control groups of the second kind, and of the first.
PLACES = (
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)


@contextlib.contextmanager
def at_most(nbytes: int) -> Iterator[list[str]]:
    """What to put in front of a command. Pages of files count, and are dropped when they are in the way."""
    group = _group(nbytes)
    if group is None:
        pytest.skip("this process may not make a control group with a limit of memory")
    try:
        yield ["sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh"]
    finally:
        for _ in range(50):  # until the kernel has let go of the last process
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def _group(nbytes: int) -> Path | None:
    for place, limit in PLACES:
        group = place / f"fxopt-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(nbytes))
                return group
            except OSError:
                group.rmdir()
    return None
