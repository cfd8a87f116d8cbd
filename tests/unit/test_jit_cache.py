# SPDX-License-Identifier: Apache-2.0
"""The cache of kernels under damage, refusal and many processes."""

from __future__ import annotations

import collections
import fcntl
import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from deepcomm import jit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NUM_PROCESSES = 8


def never() -> bytes:
    raise AssertionError("built although the cache has it")


def test_cache_keeps_any_bytes(tmp_path: Path) -> None:
    cache = jit.DiskCache(tmp_path / "new" / "folder")
    assert cache.load("key") is None
    for key, payload in (("empty", b""), ("key", bytes(range(256)) * 100)):
        assert cache.get_or_build(key, lambda payload=payload: payload) == (payload, True)
        assert cache.get_or_build(key, never) == (payload, False)
    assert len(cache.sizes()) == 2
    assert list(cache.folder.glob("*.tmp")) == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="short"),
        pytest.param(lambda content: content + b"x", id="long"),
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 1]), id="bit"),
        pytest.param(lambda content: b"older" + content, id="head"),
        pytest.param(lambda _: b"", id="empty"),
    ],
)
def test_cache_builds_damaged_entries_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    cache = jit.DiskCache(tmp_path)
    cache.get_or_build("key", lambda: b"payload")
    (path,) = tmp_path.glob("*.bin")
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "deepcomm"):
        assert cache.get_or_build("key", lambda: b"payload") == (b"payload", True)
    assert "is damaged and will be built again" in caplog.text
    assert cache.get_or_build("key", never) == (b"payload", False)


def test_cache_stores_nothing_of_a_failed_build(tmp_path: Path) -> None:
    cache = jit.DiskCache(tmp_path)
    with pytest.raises(AssertionError):
        cache.get_or_build("key", never)
    assert cache.sizes() == []
    assert cache.get_or_build("key", lambda: b"payload") == (b"payload", True)


def test_cache_does_without_a_folder_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = jit.DiskCache(tmp_path / "file")
    assert cache.get_or_build("key", lambda: b"payload") == (b"payload", True)
    assert "cannot be" in caplog.text


def test_cache_does_not_wait_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = jit.DiskCache(tmp_path, lock_timeout_s=0.1)
    with (tmp_path / "key.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cache.get_or_build("key", lambda: b"payload") == (b"payload", True)
    assert "locked for over 0.1 s" in caplog.text


KILLED = """
import sys, time
from pathlib import Path
from deepcomm import jit

def build():
    print("building", flush=True)
    time.sleep(600)

jit.DiskCache(Path(sys.argv[1])).get_or_build("key", build)
"""


def test_cache_outlives_a_process_that_is_killed_while_it_builds(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "cache"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.kill()
    cache = jit.DiskCache(tmp_path / "cache", lock_timeout_s=1e9)
    assert cache.get_or_build("key", lambda: b"payload") == (b"payload", True)


# Many processes: one imports, the others are forked from it and wait for each other.

PROCESSES = """
import json, multiprocessing, os, sys, time
from dataclasses import replace
from pathlib import Path
from deepcomm import jit
from deepcomm.jit.toolchain import Output

class Slow:
    version = "slow"
    def compile(self, unit):
        time.sleep(0.1)
        return Output(unit.entry.encode(), "", "", unit.entry)

def make():
    if sys.argv[1] == "nvrtc":
        return jit.default_compiler()
    return jit.KernelCompiler(Slow(), jit.source_root(), jit.kernel_cache())

def work(_):
    compiler = make()
    barrier.wait(60)
    kernels = [
        compiler.compile(kernel, arch="sm_90a", spec=spec)
        for kernel in jit.KERNELS if not kernel.uses_nccl for spec in jit.spec_grid(kernel)
    ]
    return [(k.symbol, k.cubin.hex(), k.is_new) for k in kernels]

count = int(sys.argv[2])
context = multiprocessing.get_context("fork")
barrier = context.Barrier(count)
with context.Pool(count) as pool:
    print(json.dumps(pool.map(work, range(count), chunksize=1)))
"""


def run_processes(folder: Path, toolchain_name: str, count: int) -> list[list[Any]]:
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, toolchain_name, str(count)],
        cwd=folder,
        env={**os.environ, "DEEPCOMM_CACHE_DIR": str(folder / "cache")},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "toolchain_name",
    [
        pytest.param("slow", marks=pytest.mark.slow),
        pytest.param("nvrtc", marks=pytest.mark.nvrtc),
    ],
)
def test_processes_that_start_at_once_compile_each_kernel_once(
    tmp_path: Path, toolchain_name: str
) -> None:
    everyone = run_processes(tmp_path, toolchain_name, NUM_PROCESSES)
    num_compiled = collections.Counter()
    for process in everyone:
        num_compiled.update({symbol: is_new for symbol, _, is_new in process})
    assert set(num_compiled.values()) == {1}
    assert len(num_compiled) >= sum(not kernel.uses_nccl for kernel in jit.KERNELS)
    assert len({tuple((symbol, cubin) for symbol, cubin, _ in p) for p in everyone}) == 1

    (later,) = run_processes(tmp_path, toolchain_name, 1)
    assert [symbol for symbol, _, is_new in later if is_new] == []
