# SPDX-License-Identifier: Apache-2.0
"""What this machine and this installation are: facts for results and for ``doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["commit", "hardware", "num_cores", "package_version", "versions"]

GIT_TIMEOUT_S = 10


def package_version(name: str = "deepcomm") -> str:
    """Return the installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def num_cores() -> int:
    """Return the cores this process may run on."""
    return len(os.sched_getaffinity(0))


def versions() -> dict[str, str]:
    """Return the versions that a measurement depends on."""
    return {
        "deepcomm": package_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "cuda": torch.version.cuda or "none",
    }


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and GPUs, without names that identify the machine."""
    found: dict[str, Any] = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": num_cores(),
        "memory": _field(Path("/proc/meminfo"), "MemTotal") or "unknown",
    }
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(count)]
    return found


def commit() -> str | None:
    """Return the commit of the checkout this package runs from, None where it is installed."""
    package = Path(__file__).resolve().parents[1]
    root = _git(package, "rev-parse", "--show-toplevel")
    if root is None or Path(root) / "deepcomm" != package:
        return None
    changed = "-dirty" if _git(package, "status", "--porcelain", "--", str(package)) else ""
    return f"{_git(package, 'rev-parse', 'HEAD')}{changed}"


def _field(path: Path, name: str) -> str | None:
    """Return the first value of ``name : value`` in a file under /proc."""
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        return None
    return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
