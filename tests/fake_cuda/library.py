# SPDX-License-Identifier: Apache-2.0
"""Builds the driver without a GPU, and steers it."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import subprocess
import threading
from functools import cache
from pathlib import Path

from deepcomm._C import cuda

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "tests/fake_cuda/driver.cpp", ROOT / "csrc/host/cuda_api.hpp")
BUILD = ROOT / "build" / "fake_cuda"
COMMAND = ("g++", "-std=c++17", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror")
KINDS = (
    *("context", "stream", "device memory", "host memory"),
    *("allocation", "reservation", "mapping", "module"),
)


@cache
def build() -> Path:
    """Compile the library unless that has been done."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES)).hexdigest()[:16]
    path = BUILD / f"libfakecuda-{digest}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        command = [*COMMAND, f"-I{ROOT / 'csrc'}", str(SOURCES[0]), "-o", str(partial)]
        subprocess.run(command, check=True)
        partial.replace(path)
    return path


class FakeCuda:
    """The library of this process, and what it has seen."""

    def __init__(self) -> None:
        self.path = str(build())
        self._library = ctypes.CDLL(self.path)
        self._library.fake_reset()
        self._before: dict[str, int] = {}
        self._before = self.live()  # streams stay for ever

    def driver(self) -> cuda.Driver:
        return cuda.Driver(self.path)

    def set_attribute(self, device: int, attribute: int, value: int) -> None:
        self._library.fake_set_attribute(device, attribute, value)

    def set_driver_version(self, version: int) -> None:
        """Say that the driver is of a CUDA release, such as 12030."""
        self._library.fake_set_driver_version(version)

    def set_peer_access(self, granted: bool) -> None:
        self._library.fake_set_peer_access(int(granted))

    def fail_after(self, num_calls: int) -> None:
        """Let one call fail, after so many more."""
        self._library.fake_fail_after(num_calls)

    def has_failed(self) -> bool:
        return bool(self._library.fake_has_failed())

    def fail_call(self, name: str, code: int) -> None:
        """Let all calls of a function fail."""
        self._library.fake_fail_call(name.encode(), code)

    def hide(self, name: str) -> None:
        """Be a driver without a function."""
        self._library.fake_hide(name.encode())

    def num_calls(self, name: str) -> int:
        return int(self._library.fake_num_calls(name.encode()))

    def make_current(self, device: int | None) -> None:
        """Let this thread have a context, as if torch had made it current."""
        self._library.fake_make_current(-1 if device is None else device)

    def last_launch(self) -> tuple[int, ...]:
        """Return grid, block, shared memory, stream, first word of arguments, and early or not."""
        values = (ctypes.c_int64 * 6)()
        self._library.fake_last_launch(values)
        return tuple(values)

    def live(self, *, put_off: bool = False) -> dict[str, int]:
        """Return how many of each kind live that did not at first, without those of none.

        Those whose end is put off count if ``put_off``; else they end here.
        """
        gc.collect()
        if not put_off:
            cuda.free_put_off()
        counts = {
            kind: int(self._library.fake_live(kind.encode())) - self._before.get(kind, 0)
            for kind in KINDS
        }
        return {kind: count for kind, count in counts.items() if count}
