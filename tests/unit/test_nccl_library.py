# SPDX-License-Identifier: Apache-2.0
"""Which libnccl is taken, which are refused, and what ``deepcomm doctor`` says of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_nccl.library import NAMED_AS_NCCL, WITHOUT_FINALIZE, FakeNccl, build

import deepcomm._C
from deepcomm._C import nccl
from deepcomm.backends.cuda import nccl as networks
from deepcomm.backends.cuda.nccl import Found, default_library, find_wheel, probe_nccl
from deepcomm.cli.checks import gpu
from deepcomm.cli.checks import nccl as check
from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.errors import NcclError

ROOT = Path(__file__).parents[2]
OPEN = nccl.Library.open


@pytest.fixture
def fake() -> FakeNccl:
    return FakeNccl()


# The one that is taken


def find(path: Path | str, *loaded: Path, folder: Path | None = None) -> tuple[str, str, bool]:
    """Return path, version and whether it was loaded, as a fresh process finds them."""
    program = [sys.executable, ROOT / "tests/fake_nccl/find.py", deepcomm._C.__file__]
    environment = {"LD_LIBRARY_PATH": str(folder)} if folder else {}
    output = subprocess.check_output(
        [*program, path, *loaded], env={**os.environ, **environment}, text=True
    )
    return tuple(json.loads(output))


def copy_as(name: str, folder: Path) -> Path:
    return Path(shutil.copy(build(), folder / name))


def test_library_that_is_loaded_is_taken_before_all_others(tmp_path: Path) -> None:
    loaded, other = build(NAMED_AS_NCCL), copy_as("other.so", tmp_path)
    assert find(other, loaded) == (str(loaded), "2.28.9", True)


@pytest.mark.parametrize("name", ["libnccl.so.2.28.9", "libtorch_cuda.so"])
def test_library_that_is_loaded_under_another_name_is_taken(tmp_path: Path, name: str) -> None:
    loaded = copy_as(name, tmp_path)
    assert find(build(), loaded) == (str(loaded), "2.28.9", True)


def test_torch_without_nccl_inside_is_passed_over(tmp_path: Path) -> None:
    torch_library = tmp_path / "libtorch_cuda.so"
    subprocess.run(["g++", "-shared", "-o", torch_library, "-x", "c++", "/dev/null"], check=True)
    assert find(build(), torch_library) == (str(build()), "2.28.9", False)


def test_loader_comes_last(tmp_path: Path) -> None:
    of_loader = copy_as("libnccl.so.2", tmp_path)
    assert find(build(), folder=tmp_path) == (str(build()), "2.28.9", False)
    assert find("", folder=tmp_path) == (str(of_loader), "2.28.9", False)
    assert find("/none/libnccl.so.2", folder=tmp_path) == (str(of_loader), "2.28.9", False)


def test_wheel_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = {
        "nvidia_nccl_cu12-2.28.9.dist-info": "nvidia/nccl/lib/libnccl.so.2,,\n",
        "other-1.dist-info": "nvidia/nccl/lib/libnccl.so.2,,\n",
    }
    for name, record in reversed(records.items()):
        (tmp_path / name).mkdir()
        project = name.split("-")[0].replace("_", "-")
        (tmp_path / name / "METADATA").write_text(f"Name: {project}\nVersion: 1\n")
        (tmp_path / name / "RECORD").write_text(record)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_wheel() == str(tmp_path / "nvidia/nccl/lib/libnccl.so.2")
    shutil.rmtree(tmp_path / "nvidia_nccl_cu12-2.28.9.dist-info")
    assert find_wheel() is None


# Those that are refused


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (21805, "expected NCCL 2.19.0 or newer, of series 2, got 2.18.5"),
        (30000, "expected NCCL 2.19.0 or newer, of series 2, got 3.0.0"),
    ],
)
def test_other_versions_are_refused(fake: FakeNccl, version: int, text: str) -> None:
    fake.wish("version", version)
    with pytest.raises(NcclError) as caught:
        fake.library()
    assert str(caught.value) == f"{fake.path}: {text}"


@pytest.mark.parametrize("version", [21900, 23203])
def test_supported_versions_are_not(fake: FakeNccl, version: int) -> None:
    fake.wish("version", version)
    assert fake.library().version == f"2.{version // 100 % 100}.{version % 100}"


def test_library_without_a_function_is_refused() -> None:
    fake = FakeNccl(WITHOUT_FINALIZE)
    text = "expected NCCL 2.19.0 or newer, got a library without ncclCommFinalize"
    with pytest.raises(NcclError) as caught:
        fake.library()
    assert str(caught.value) == f"{fake.path}: {text}"
    with pytest.raises(NcclError, match=r"^libc\.so\.6: .* without ncclGetVersion$"):
        nccl.Library.open("libc.so.6")


class Finder:
    """Stands in for the native class: finds one library, whatever is loaded here."""

    def __init__(self, path: str) -> None:
        self._path = path

    def find(self, path: str) -> nccl.Library:
        assert path == "of the wheel"
        return OPEN(self._path)


def test_probe_says_what_is_found_or_why_nothing(
    fake: FakeNccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "find_wheel", lambda: "of the wheel")
    default_library.cache_clear()
    try:
        monkeypatch.setattr(nccl, "Library", Finder("libnone.so"))
        reason = "libnone.so cannot be opened: libnone.so: cannot open shared object file"
        assert str(probe_nccl()).startswith(reason)
        monkeypatch.setattr(nccl, "Library", Finder(fake.path))
        assert probe_nccl() == Found(fake.path, "2.28.9", was_loaded=False)
        assert default_library() is default_library(), "looked for once"
    finally:
        default_library.cache_clear()


# NVIDIA's own

STUBS = {
    "cuda_runtime.h": "typedef struct CUstream_st* cudaStream_t;\n"
    "typedef struct CUevent_st* cudaEvent_t;\n#define CUDART_VERSION 10000\n",
    "cuda_fp16.h": "",
    "cuda.h": "#define CUDA_VERSION 10000\ntypedef enum { CU_MEM_LOCATION } CUmemLocationType;\n",
}
"""What NCCL's header takes of CUDA's."""


def compile_check(csrc: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    for name, text in STUBS.items():
        (folder / name).write_text(text)
    header = Path(find_wheel() or "").parents[1] / "include"
    flags = ["-std=c++17", "-fsyntax-only", f"-I{csrc}", f"-I{folder}", f"-I{header}"]
    command = ["g++", *flags, str(ROOT / "tests/fake_nccl/api.cpp")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.nccl
def test_declarations_agree_with_nccls_header(tmp_path: Path) -> None:
    done = compile_check(ROOT / "csrc", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.nccl
@pytest.mark.parametrize(
    ("correct", "wrong", "named"),
    [
        ("kRemoteError = 6", "kRemoteError = 5", "ncclRemoteError"),
        ("kUint8 = 1", "kUint8 = 0", "ncclUint8"),
        ("char bytes[128]", "char bytes[64]", "ncclUniqueId"),
        ("0xcafebeef", "0xcafebeee", "NCCL_API_MAGIC"),
        ("int cga_cluster_size", "long cga_cluster_size", "Config::cga_cluster_size"),
        ("(Comm comm, Result * error)", "(Comm comm, Result error)", "ncclCommGetAsyncError"),
    ],
)
def test_declarations_that_differ_are_found(
    tmp_path: Path, correct: str, wrong: str, named: str
) -> None:
    text = (ROOT / "csrc/host/nccl_api.hpp").read_text()
    assert text.count(correct) == 1
    shutil.copytree(ROOT / "csrc/host", tmp_path / "host")
    (tmp_path / "host/nccl_api.hpp").write_text(text.replace(correct, wrong))
    done = compile_check(tmp_path, tmp_path)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.nccl
def test_nvidias_library_is_understood() -> None:
    wheel = find_wheel()
    assert wheel is not None
    path, version, was_loaded = find(wheel)
    assert (path, was_loaded) == (wheel, False)
    assert version.startswith("2.")


# Doctor


def doctor(monkeypatch: pytest.MonkeyPatch, found: Found | str, of_torch: str | None) -> Finding:
    monkeypatch.setattr(check, "probe_nccl", lambda: found)
    monkeypatch.setattr(check, "torch_version", lambda: of_torch)
    (finding,) = check.check_nccl()
    return finding


LOADED = Found("/torch/libnccl.so.2", "2.28.9", was_loaded=True)
WHEEL = Found("/wheel/libnccl.so.2", "2.28.9", was_loaded=False)


def test_doctor_says_which_nccl_would_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    of_torch = doctor(monkeypatch, LOADED, "2.28.9")
    assert (of_torch.status, of_torch.detail) == (
        Status.OK,
        '2.28.9, /torch/libnccl.so.2 (the one that torch has loaded): rail="nccl" can use it',
    )
    assert "(torch has none)" in doctor(monkeypatch, WHEEL, None).detail


@pytest.mark.parametrize(("found", "of_torch"), [(LOADED, "2.27.5"), (WHEEL, "2.28.9")])
def test_doctor_warns_of_a_second_nccl(
    monkeypatch: pytest.MonkeyPatch, found: Found, of_torch: str
) -> None:
    finding = doctor(monkeypatch, found, of_torch)
    assert finding.status is Status.WARN
    assert finding.detail.endswith(f"but torch uses another one, of version {of_torch}")
    assert "have one libnccl" in str(finding.remedy)


@pytest.mark.parametrize("has_driver", [False, True])
def test_doctor_says_what_follows_without_nccl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_driver: bool
) -> None:
    monkeypatch.setattr(gpu, "DRIVER_VERSION", tmp_path if has_driver else tmp_path / "none")
    finding = doctor(monkeypatch, "libnccl.so.2 cannot be opened", None)
    assert finding.status is (Status.WARN if has_driver else Status.INFO)
    assert 'rail="lsa"): libnccl.so.2 cannot be opened' in finding.detail
    assert not has_driver or "pip install" in str(finding.remedy)


def test_doctor_says_whether_kernels_can_use_nccl(
    monkeypatch: pytest.MonkeyPatch, fake: FakeNccl, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "probe_nccl", lambda: LOADED)
    monkeypatch.setattr(check, "default_library", fake.library)
    (finding,) = check.check_gin()
    assert finding.status is Status.INFO
    assert 'no rail="gin": expected NCCL 2.30.4 or newer, got 2.28.9' in finding.detail

    fake.wish("version", 23007)
    monkeypatch.setenv("DEEPCOMM_NCCL_INCLUDE", str(tmp_path))
    (finding,) = check.check_gin()
    assert finding.status is Status.INFO
    assert f"but {tmp_path} has none; set DEEPCOMM_NCCL_INCLUDE" in finding.detail

    monkeypatch.setattr(check, "probe_nccl", lambda: "there is none")
    assert list(check.check_gin()) == []


def test_doctor_asks_torch_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9, "suffix"))
    for is_available, version in ((True, "2.28.9"), (False, None)):
        monkeypatch.setattr(
            torch.distributed, "is_nccl_available", lambda answer=is_available: answer
        )
        assert check.torch_version() == version
