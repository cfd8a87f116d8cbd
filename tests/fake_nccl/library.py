# SPDX-License-Identifier: Apache-2.0
"""Builds the NCCL without a GPU, and steers it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import subprocess
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deepcomm._C import nccl

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    ROOT / "tests/fake_nccl/nccl.cpp",
    ROOT / "tests/fake_nccl/device_api.hpp",
    ROOT / "csrc/host/nccl_api.hpp",
    ROOT / "csrc/host/cuda_api.hpp",
)
BUILD = ROOT / "build" / "fake_nccl"
COMMAND = ("g++", "-std=c++17", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror")

WITHOUT_FINALIZE = "-DFAKE_NCCL_HIDE(name)=no_##name"
NAMED_AS_NCCL = "-Wl,-soname,libnccl.so.2"
"""The loader finds it by the name of the real one, once it is loaded."""


@cache
def build(*options: str) -> Path:
    """Compile the library unless that has been done."""
    content = b"".join(source.read_bytes() for source in SOURCES) + repr(options).encode()
    path = BUILD / f"libfakenccl-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        arguments = (*options, f"-I{ROOT / 'csrc'}", str(SOURCES[0]), "-o", str(partial))
        subprocess.run([*COMMAND, *arguments, "-lpthread"], check=True)
        partial.replace(path)
    return path


@dataclass(frozen=True)
class Asked:
    """What the library was last asked for."""

    config_bytes: int
    config_version: int
    blocking: int
    traffic_class: int
    max_ctas: int
    stream: int


class FakeNccl:
    """The library of this process."""

    def __init__(self, *options: str) -> None:
        self.path = str(build(*options))
        self._library = ctypes.CDLL(self.path)
        self._library.fake_nccl_reset()
        self._before = int(self._library.fake_nccl_num_live())

    def library(self) -> nccl.Library:
        return nccl.Library.open(self.path)

    def wish(self, what: str, value: int = 1) -> None:
        """Let it behave: "version", "async error", "fail CALL", "hang CALL", "block CALL"."""
        self._library.fake_nccl_wish(what.encode(), value)

    def num_live(self) -> int:
        """Return how many communicators there are that were not at first."""
        gc.collect()
        return int(self._library.fake_nccl_num_live()) - self._before

    def group_depth(self) -> int:
        """Return how many groups this thread has not ended."""
        return int(self._library.fake_nccl_depth())

    def requirements(self) -> tuple[int, ...]:
        """Return what was last asked of a device communicator, word by word."""
        words = (ctypes.c_int32 * 8)()
        self._library.fake_nccl_requirements(words)
        return tuple(words)

    def asked(self) -> Asked:
        values = (ctypes.c_int64 * 6)()
        self._library.fake_nccl_last(values)
        return Asked(*values)
