# SPDX-License-Identifier: Apache-2.0
"""Checks of the interpreter, the packages and shared memory."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.cli.environment import num_cores, package_version

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_python", "check_shared_memory"]

PIDFD_KERNEL = (5, 3)
SHM = Path("/dev/shm")
SMALL_SHM_BYTES = 2 << 30
GIB = 1 << 30
SHM_REMEDY = (
    "containers: docker run --shm-size=16g (or --ipc=host); "
    "hosts: mount -o remount,size=16g /dev/shm"
)


def check_python() -> Iterator[Finding]:
    """Look at the interpreter, the kernel and deepcomm's own parts."""
    section = "python"
    yield Finding(section, "python", Status.OK, f"{platform.python_version()}, {num_cores()} cores")
    if sys.platform != "linux":
        yield Finding(section, "system", Status.FAIL, sys.platform, "deepcomm runs on Linux only")
    else:
        yield _kernel(section)
    for name in ("torch", "numpy"):
        version = package_version(name)
        yield Finding(section, name, Status.OK, version)
    try:
        extension = importlib.import_module("deepcomm._C")
    except ImportError as error:
        remedy = "pip install deepcomm again; in a checkout: pip install -e ."
        yield Finding(section, "deepcomm._C", Status.FAIL, str(error), remedy)
    else:
        where = f"{package_version()}, {Path(str(extension.__file__)).name}"
        yield Finding(section, "deepcomm", Status.OK, where)
    absent = [name for name in ("rich", "matplotlib") if package_version(name) == "not installed"]
    if absent:
        detail = f"without {' and '.join(absent)}: no progress bars, no --plot"
        yield Finding(section, "bench extra", Status.INFO, detail, "pip install deepcomm[bench]")


def _kernel(section: str) -> Finding:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < PIDFD_KERNEL:
        detail = f"{release}: a dead peer is only noticed when a wait times out"
        wanted = ".".join(map(str, PIDFD_KERNEL))
        return Finding(section, "kernel", Status.WARN, detail, f"use Linux {wanted} or newer")
    return Finding(section, "kernel", Status.OK, release)


def check_shared_memory() -> Iterator[Finding]:
    """Look at the size of /dev/shm, and reserve a page there."""
    section, name = "memory", str(SHM)
    try:
        space = os.statvfs(SHM)
    except OSError as error:
        yield Finding(section, name, Status.FAIL, str(error), f"mount -t tmpfs tmpfs {SHM}")
        return
    size, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    detail = f"{free / GIB:.2f} GiB free of {size / GIB:.2f} GiB"
    error_text = _try_to_reserve()
    if error_text is not None:
        yield Finding(section, name, Status.FAIL, f"{detail}; {error_text}", SHM_REMEDY)
    elif free < SMALL_SHM_BYTES:
        detail += ": all ranks of a host share it, deepcomm.buffer_bytes() says how much one takes"
        yield Finding(section, name, Status.WARN, detail, SHM_REMEDY)
    else:
        yield Finding(section, name, Status.OK, detail)


def _try_to_reserve() -> str | None:
    """Reserve and free one page of shared memory; return what went wrong."""
    path = SHM / f"deepcomm-doctor-{os.getpid()}"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        return f"cannot create a segment: {error}"
    try:
        os.posix_fallocate(file, 0, os.sysconf("SC_PAGESIZE"))
    except OSError as error:
        return f"cannot reserve memory: {error}"
    finally:
        os.close(file)
        path.unlink()
    return None
