"""What a figure has to be read with: the machine, versions, the commit, the day."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

BUSY = 0.75  # processes per core that want to run before anything is started


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured."""

    device: str
    cores: int
    threads: int
    load: float  # processes that wanted to run, in the minute before
    versions: dict[str, str]
    commit: str
    date: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        names = {"torch": torch.__version__, "transformers": transformers.__version__, "fxopt": version("fxopt")}
        return cls(
            torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            os.cpu_count() or 1,
            torch.get_num_threads(),
            os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
            {**names, "python": platform.python_version()},
            _commit(),
            datetime.date.today().isoformat(),
        )

    @property
    def is_busy(self) -> bool:
        return self.load > BUSY * self.cores

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        commit = f" ({self.commit})" if self.commit else ""
        found = f"{self.device}, {self.threads} threads of {self.cores} cores; {versions}{commit}; {self.date}"
        if self.is_busy:
            found += f"\nThe machine was busy: {self.load:.1f} processes wanted to run. Read ratios, not milliseconds."
        return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that fxopt runs from, with a plus if files in it were changed; nothing if there is none."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        # fxopt that was installed into some other project's checkout is none of that project's commits.
        if not commit or not git("ls-files", "--error-unmatch", Path(__file__).name):
            return ""
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""
