# SPDX-License-Identifier: Apache-2.0
"""Builds the network between the GPUs of one host, and a driver that makes it run without a GPU.

NCCL takes the network where ``environment()`` is set before the process's first communicator.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[2] / "build" / "gin_loopback"
COMPILER = (
    *(os.environ.get("CXX", "c++"), "-std=c++17", "-shared", "-fPIC", "-O2", "-g1"),
    *("-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"),
)
PLUGIN_SOURCES = ("plugin.cpp", "comm.cpp", "link.cpp", "ring.cpp", "device.cpp")


@cache
def plugin() -> Path:
    """Return the path of the plugin, compiled unless that has been done."""
    return _build("libdeepcomm_loopback", PLUGIN_SOURCES)


@cache
def late_driver() -> Path:
    """Return the path of the driver without a GPU."""
    return _build("liblate_driver", ("late_driver.cpp",), "-fvisibility=default")


def environment(folder: Path | str = "/dev/shm") -> dict[str, str]:
    """Return what lets NCCL use the network, by files in a folder that all ranks see."""
    return {
        "NCCL_RMA_PLUGIN": str(plugin()),
        "NCCL_GIN_TYPE": "2",  # the proxy, whatever NICs there are
        "DEEPCOMM_LOOPBACK_DIR": str(folder),
    }


def _build(name: str, sources: tuple[str, ...], *options: str) -> Path:
    content = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[ch]pp")))
    digest = hashlib.sha256(content + repr((COMPILER, options)).encode()).hexdigest()[:16]
    path = BUILD / f"{name}-{digest}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        files = [str(HERE / source) for source in sources]
        command = [*COMPILER, *options, *files, "-o", str(partial), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        partial.replace(path)
    return path
