# SPDX-License-Identifier: Apache-2.0
"""What ``deepcomm doctor`` says of NVRTC, the kernels and their cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deepcomm import jit
from deepcomm.cli.checks import gpu
from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.jit import sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def by_name(check: Callable[[], Iterator[Finding]]) -> dict[str, Finding]:
    return {finding.name: finding for finding in check()}


def test_doctor_reports_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPCOMM_CACHE_DIR", str(tmp_path / "new"))
    found = by_name(gpu.check_kernels)
    assert found["kernels"].detail.startswith(f"{len(jit.KERNELS)} sources in ")
    assert found["kernel cache"].status is Status.OK
    assert found["kernel cache"].detail.startswith("0 compiled, 0.0 MB")

    jit.kernel_cache().get_or_build("key", lambda: bytes(300_000))
    folder = tmp_path / "new" / "kernels"
    assert by_name(gpu.check_kernels)["kernel cache"].detail == f"1 compiled, 0.3 MB in {folder}"


def test_doctor_warns_of_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEEPCOMM_CACHE_DIR", str(tmp_path / "file"))
    finding = by_name(gpu.check_kernels)["kernel cache"]
    assert finding.status is Status.WARN
    assert "DEEPCOMM_CACHE_DIR" in str(finding.remedy)


def test_doctor_warns_of_missing_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOTS", (Path("/nowhere"),))
    finding = by_name(gpu.check_kernels)["kernels"]
    assert (finding.status, finding.remedy) == (Status.WARN, "pip install deepcomm again")


@pytest.mark.nvrtc
def test_doctor_finds_nvrtc_and_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(gpu.check_nvrtc)
    assert {name: finding.status for name, finding in found.items()} == {
        "NVRTC": Status.OK,
        "CUDA headers": Status.OK,
    }

    def missing(major: int) -> jit.CudaHeaders:
        raise jit.CompilerMissing(f"the headers of CUDA {major} are not installed")

    monkeypatch.setattr(jit, "find_headers", missing)
    finding = by_name(gpu.check_nvrtc)["CUDA headers"]
    assert finding.status is Status.WARN
    assert "pip install deepcomm[cu12]" in str(finding.remedy)
