# SPDX-License-Identifier: Apache-2.0
"""Our declarations of the driver's interface agree with CUDA's own header, where that is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deepcomm import jit

pytestmark = pytest.mark.nvrtc

ROOT = Path(__file__).parents[2]


def compile_check(folder: Path) -> subprocess.CompletedProcess[str]:
    headers = jit.find_nvrtc().headers.folder
    if not (headers / "cuda.h").exists():
        pytest.skip(f"needs cuda.h, which {headers} has not")
    source = folder / "host" / "cuda_api.hpp"
    flags = ["-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{headers}"]
    assert source.exists()
    return subprocess.run(
        ["g++", *flags, str(ROOT / "tests/fake_cuda/api.cpp")],
        capture_output=True,
        text=True,
        check=False,
    )


def test_declarations_agree_with_cudas_header() -> None:
    done = compile_check(ROOT / "csrc")
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("correct", "wrong", "named"),
    [
        ("kFabric = 8", "kFabric = 4", "CU_MEM_HANDLE_TYPE_FABRIC"),
        ("kReadWrite = 3", "kReadWrite = 1", "CU_MEM_ACCESS_FLAGS_PROT_READWRITE"),
        ("unsigned block[3];", "unsigned block[4];", "LaunchConfig"),
        ("(Device * device, int ordinal)", "(Device * device, int64_t ordinal)", "cuDeviceGet"),
        ("(AllocationHandle handle))", "(AllocationHandle handle, int flags))", "cuMemRelease"),
    ],
)
def test_declarations_that_differ_are_found(
    tmp_path: Path, correct: str, wrong: str, named: str
) -> None:
    text = (ROOT / "csrc/host/cuda_api.hpp").read_text()
    assert text.count(correct) == 1
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "cuda_api.hpp").write_text(text.replace(correct, wrong))
    done = compile_check(tmp_path)
    assert done.returncode != 0
    assert named in done.stderr
