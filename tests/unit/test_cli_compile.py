# SPDX-License-Identifier: Apache-2.0
"""``deepcomm compile``: arguments, report, exit status."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from jit_project import REPORT, SCALE, FakeToolchain, write_project

from deepcomm import jit
from deepcomm.cli import compile as compile_command
from deepcomm.cli import main

if TYPE_CHECKING:
    from pathlib import Path

NUM_CORES = 3
NO_SPILL = REPORT.replace("8 bytes spill stores, 12", "0 bytes spill stores, 0")


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> jit.KernelCompiler:
    root = write_project(tmp_path / "project")
    made = jit.KernelCompiler(FakeToolchain(), root, jit.DiskCache(tmp_path / "cache"))
    monkeypatch.setattr(jit, "default_compiler", lambda: made)
    monkeypatch.setattr(jit, "KERNELS", (SCALE,))
    # Other processes would know nothing of these.
    monkeypatch.setattr(compile_command, "ProcessPoolExecutor", make_threads)
    monkeypatch.setattr(compile_command, "num_cores", lambda: NUM_CORES)
    return made


def make_threads(num_threads: int, mp_context: object) -> ThreadPoolExecutor:
    del mp_context
    return ThreadPoolExecutor(num_threads)


def test_compile_fills_the_cache(
    compiler: jit.KernelCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--arch", "sm_90a"]) == 0
    assert "4 kernels, 4 compiled now, 0 left out, problems 0" in capfd.readouterr().err
    assert main(["compile"]) == 0  # two architectures, one of them known
    said = capfd.readouterr()
    assert said.out == ""
    assert "8 kernels, 4 compiled now, 0 left out, problems 0" in said.err
    assert str(compiler.cache.folder) in said.err


def test_compile_takes_hidden_sizes(
    compiler: jit.KernelCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--arch", "sm_90a", "--hidden", "2560, 64", "--json"]) == 0
    records = json.loads(capfd.readouterr().out)
    assert [record["spec"]["hidden"] for record in records] == [2560, 2560, 64, 64]
    assert len(compiler.cache.sizes()) == 4
    assert records[0] == {
        "kernel": "scale",
        "arch": "sm_90a",
        "spec": {"hidden": 2560, "negate": False},
        "compiled_now": True,
        "cubin_bytes": records[0]["cubin_bytes"],
        "shared_bytes": 640,
        "max_threads": 96,
        "usage": {
            "num_registers": 40, "static_shared_bytes": 512, "stack_bytes": 16, "spill_bytes": 20,
        },
    }  # fmt: skip


def test_compile_leaves_out_what_headers_are_missing_for(
    compiler: jit.KernelCompiler, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> jit.NcclHeaders:
        raise jit.HeadersMissing("NCCL's device headers: expected those of 2.30.7")

    monkeypatch.setattr(jit, "KERNELS", (SCALE, replace(SCALE, name="agent", uses_nccl=True)))
    monkeypatch.setattr(compile_command, "loaded_nccl_headers", missing)
    assert main(["compile", "--arch", "sm_90a", "--hidden", "64"]) == 0
    said = capfd.readouterr().err
    reason = "left out: NCCL's device headers: expected those of 2.30.7"
    assert f"agent<hidden=64, negate=True> for sm_90a: {reason}" in said
    assert "2 kernels, 2 compiled now, 2 left out, problems 0" in said
    assert main(["compile", "--arch", "sm_90a", "--hidden", "64", "--no-skips"]) == 1
    assert compiler.cache.sizes()


def test_compile_report_ends_with_status_1_on_a_spill(
    compiler: jit.KernelCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--arch", "sm_90a", "--hidden", "64", "--report"]) == 1
    said = capfd.readouterr()
    assert "scale<hidden=64, negate=True> for sm_90a: spills 20 bytes of registers" in said.err
    row = next(line for line in said.out.splitlines() if "negate=True" in line)
    assert row.split()[2:] == ["sm_90a", "40", "1152", "16", "20", "96"]

    compiler.toolchain.log = NO_SPILL
    compiler.cache.folder.rename(compiler.cache.folder.with_name("old"))
    assert main(["compile", "--arch", "sm_90a", "--hidden", "64", "--report"]) == 0


def test_compile_report_fails_where_the_figures_are_unknown(
    compiler: jit.KernelCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler.toolchain.log = ""
    assert main(["compile", "--arch", "sm_90a", "--report"]) == 1
    assert "report cannot be read" in capfd.readouterr().err


def test_compile_goes_on_after_a_kernel_that_does_not_compile(
    compiler: jit.KernelCompiler,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    good = compiler.toolchain.compile

    def compile_unit(unit: jit.TranslationUnit) -> object:
        if "true" in unit.entry:
            raise jit.CompileError("scale.cuh(3): error: no")
        return good(unit)

    monkeypatch.setattr(compiler.toolchain, "compile", compile_unit)
    assert main(["compile", "--arch", "sm_90a", "--report", "--hidden", "64"]) == 1
    said = capfd.readouterr()
    assert "scale.cuh(3): error: no" in said.err
    assert "2 kernels, 1 compiled now, 0 left out, problems 2" in said.err
    assert said.out.count("?") == 5
    assert main(["compile", "--arch", "sm_90a", "--json", "--hidden", "64"]) == 1
    assert json.loads(capfd.readouterr().out)[1]["error"] == "scale.cuh(3): error: no"


def test_compile_goes_on_where_a_process_was_killed(
    compiler: jit.KernelCompiler,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Broken(ThreadPoolExecutor):
        def __init__(self, num_threads: int, mp_context: object) -> None:
            del mp_context
            super().__init__(num_threads)

        def submit(self, *_: object, **__: object) -> Any:
            raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(compile_command, "ProcessPoolExecutor", Broken)
    assert main(["compile", "--arch", "sm_90a"]) == 0
    said = capfd.readouterr().err
    assert "a child process terminated abruptly; the rest is compiled one by one" in said
    assert "4 kernels, 4 compiled now" in said
    assert len(compiler.cache.sizes()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "hopper"], "arch: expected one such as sm_90a, got 'hopper'"),
        (["--arch", ""], "arch: expected one such as sm_90a, got ''"),
        (["--hidden", "7168,x"], "--hidden: expected sizes separated by commas, got '7168,x'"),
        (["--hidden", "0"], "--hidden: expected sizes separated by commas, got '0'"),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_compile_refuses_wrong_arguments(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_compile_names_the_extra_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing() -> jit.KernelCompiler:
        raise jit.CompilerMissing("CuPy is not installed; pip install deepcomm[cu12]")

    monkeypatch.setattr(jit, "default_compiler", missing)
    assert main(["compile"]) == 1
    assert "pip install deepcomm[cu12]" in capfd.readouterr().err
