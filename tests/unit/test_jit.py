# SPDX-License-Identifier: Apache-2.0
"""The JIT without a compiler: what a kernel depends on, the list, the sources, what is missing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jit_project import PROJECT, REPORT, SCALE, SPEC, FakeToolchain, write_project

from deepcomm import env, jit
from deepcomm.errors import InternalError, InvalidArgument
from deepcomm.jit import sources
from deepcomm.jit.usage import parse_usage


@pytest.fixture
def fake(tmp_path: Path) -> jit.KernelCompiler:
    root = write_project(tmp_path / "project")
    return jit.KernelCompiler(FakeToolchain(), root, jit.DiskCache(tmp_path / "cache"))


# What a kernel depends on


def test_compile_gives_what_the_host_needs_and_keeps_it(fake: jit.KernelCompiler) -> None:
    first = fake.compile(SCALE, arch="sm_90a", spec=SPEC)
    assert (first.name, first.arch, first.spec, first.symbol) == ("scale", "sm_90a", SPEC, "symbol")
    assert (first.shared_bytes, first.max_threads, first.is_new) == (640, 96, True)
    assert not first.awaits_ahead
    assert first.usage == jit.Usage(40, 512, 16, 20)
    assert first.cubin.endswith(b"\n\0\xff")
    assert fake.compile(SCALE, arch="sm_90a", spec=SPEC) == replace(first, is_new=False)
    assert len(fake.toolchain.units) == 1


@pytest.mark.parametrize(
    ("before", "awaits_ahead"),
    [
        pytest.param("", True, id="at once"),
        pytest.param("\tld.param.u32 \t%r1, [scale_param_0];\n", True, id="behind arguments"),
        pytest.param("\t@%p1 bra \t$L__BB0_3;\n\tstart:\n", True, id="behind a branch"),
        pytest.param("\tld.global.u32 \t%r1, [%rd1];\n", False, id="behind a load"),
        pytest.param("\t@!%p12 st.global.u32 \t[%rd1], %r1;\n", False, id="behind a store"),
        pytest.param("\tatom.global.add.u32 \t%r1, [%rd1], 1;\n", False, id="behind an atomic"),
        pytest.param("\tcall.uni (retval0),\n", False, id="behind a call"),
    ],
)
def test_compile_finds_whether_a_kernel_awaits_the_one_ahead(
    fake: jit.KernelCompiler, before: str, awaits_ahead: bool
) -> None:
    outside = ".func helper\n{\n\tld.global.u32 \t%r1, [%rd1];\n}\n"
    fake.toolchain.ptx += f"{outside}.visible .entry scale\n{before}\tgriddepcontrol.wait;\n"
    fake.toolchain.ptx += "\tst.global.u32 \t[%rd1], %r1;\n"
    for is_new in (True, False):
        compiled = fake.compile(SCALE, arch="sm_90a", spec=SPEC)
        assert (compiled.awaits_ahead, compiled.is_new) == (awaits_ahead, is_new)


def test_compile_instantiates_kernel_and_shared_memory(fake: jit.KernelCompiler) -> None:
    fake.compile(SCALE, arch="sm_90a", spec={"negate": True, "hidden": 7168})
    (unit,) = fake.toolchain.units
    assert unit.entry == "deepcomm::kernels::scale<7168, true>"
    assert "sizeof(deepcomm::kernels::ScaleShared<7168, true>)" in unit.text
    assert list(unit.headers) == ["common/int.hpp", "kernels/scale.cuh"]


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        pytest.param({}, False, id="nothing"),
        pytest.param({"arch": "sm_100a"}, True, id="arch"),
        pytest.param({"hidden": 7168}, True, id="spec"),
        pytest.param({"options": ("--fmad=false",)}, True, id="options"),
        pytest.param({"version": "fake 1.1"}, True, id="compiler"),
        pytest.param({"kernels/scale.cuh": "// other\n"}, True, id="source"),
        pytest.param({"common/int.hpp": "using int32_t = long;\n"}, True, id="header"),
        pytest.param({"kernels/other.cuh": "// changed\n"}, False, id="unrelated"),
        pytest.param({"device/emu/memory.cuh": "// changed\n"}, False, id="emulator"),
    ],
)
def test_compile_is_repeated_when_an_input_changes(
    fake: jit.KernelCompiler, change: dict[str, Any], is_new: bool
) -> None:
    fake.compile(SCALE, arch="sm_90a", spec=SPEC)
    (fake.root / "kernels/scale.cuh").write_text('#include "common/int.hpp"\n')
    fake.compile(SCALE, arch="sm_90a", spec=SPEC)

    for name in change.keys() & PROJECT.keys():
        (fake.root / name).write_text(change[name])
    kernel = replace(SCALE, options=change.get("options", ()))
    compiler = replace(fake, toolchain=FakeToolchain(change.get("version", "fake 1.0")))
    spec = SPEC | {"hidden": change.get("hidden", 1024)}
    arch = change.get("arch", "sm_90a")
    assert compiler.compile(kernel, arch=arch, spec=spec).is_new == is_new


@pytest.mark.parametrize("arch", ["90a", "sm_9", "sm_90b", "sm_90a\n", "compute_90", ""])
def test_compile_refuses_unknown_architectures(fake: jit.KernelCompiler, arch: str) -> None:
    with pytest.raises(InvalidArgument, match="arch: expected one such as sm_90a"):
        fake.compile(SCALE, arch=arch, spec=SPEC)


@pytest.mark.parametrize("spec", [None, {"hidden": 1}, SPEC | {"other": 1}])
def test_compile_refuses_an_incomplete_spec(
    fake: jit.KernelCompiler, spec: dict[str, int] | None
) -> None:
    with pytest.raises(InvalidArgument, match=r"spec of scale: expected \['hidden', 'negate'\]"):
        fake.compile(SCALE, arch="sm_90a", spec=spec)


def test_compile_refuses_shared_memory_that_the_list_does_not_name(
    fake: jit.KernelCompiler,
) -> None:
    fake.toolchain.ptx = ".extern .shared .align 16 .b8 raw[];"
    with pytest.raises(jit.CompileError, match="scale: uses dynamic shared memory"):
        fake.compile(replace(SCALE, shared=None), arch="sm_90a", spec=SPEC)


def test_compile_without_a_readable_report_gives_no_usage(fake: jit.KernelCompiler) -> None:
    fake.toolchain.log = "ptxas speaks otherwise"
    assert fake.compile(SCALE, arch="sm_90a", spec=SPEC).usage is None


def test_usage_covers_the_functions_that_a_kernel_calls() -> None:
    called = "ptxas . 8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
    assert parse_usage(REPORT + called) == jit.Usage(40, 512, 24, 28)


# The list and the sources


def test_kernels_are_listed_once_and_their_sources_exist() -> None:
    names = [kernel.name for kernel in jit.KERNELS]
    assert len(set(names)) == len(names) > 0
    assert [k.source for k in jit.KERNELS if not (jit.source_root() / k.source).is_file()] == []


def test_kernels_list_every_global_function() -> None:
    # A kernel of the sources that nobody lists would be neither compiled nor run in CI.
    root = jit.source_root()
    marked = {
        path.relative_to(root).as_posix()
        for path in (root / "kernels").rglob("*.cuh")
        if "__global__" in path.read_text()
    }
    assert marked == {kernel.source for kernel in jit.KERNELS}


def test_spec_grid_combines_values_and_takes_replacements() -> None:
    assert len(list(jit.spec_grid(SCALE))) == 4
    assert list(jit.spec_grid(SCALE, {"hidden": [512], "other": [1]})) == [
        {"hidden": 512, "negate": False},
        {"hidden": 512, "negate": True},
    ]
    assert list(jit.spec_grid(replace(SCALE, spec=()))) == [{}]
    with pytest.raises(InvalidArgument, match="hidden: expected values for scale, got none"):
        list(jit.spec_grid(SCALE, {"hidden": []}))


def test_source_root_names_the_folders_it_looked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROOTS", (Path("/nowhere"),))
    with pytest.raises(InternalError, match="/nowhere"):
        jit.source_root()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DEEPCOMM_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/deepcomm"),
        ({"DEEPCOMM_CACHE_DIR": "", "HOME": "/c"}, "/c/.cache/deepcomm"),
    ],
)
def test_cache_dir_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("DEEPCOMM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert env.cache_dir() == Path(folder)
    assert jit.kernel_cache().folder == Path(folder) / "kernels"


# What is missing


def test_nvrtc_missing_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    jit.find_nvrtc.cache_clear()
    with pytest.raises(jit.CompilerMissing, match=r"CuPy.*pip install deepcomm\[cu12\]"):
        jit.find_nvrtc()
    jit.find_nvrtc.cache_clear()


@pytest.mark.parametrize(
    ("major", "wheel"), [(12, "nvidia-cuda-runtime-cu12"), (13, "nvidia-cuda-runtime")]
)
def test_headers_are_found_in_the_wheel_of_their_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, major: int, wheel: str
) -> None:
    folder = {12: "nvidia/cuda_runtime/include", 13: "nvidia/cu13/include"}[major]
    header = tmp_path / folder / "cuda_bf16.h"
    metadata = tmp_path / f"{wheel.replace('-', '_')}-{major}.1.dist-info" / "METADATA"
    for path, text in ((header, ""), (metadata, f"Name: {wheel}\nVersion: {major}.1\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert jit.find_headers(major) == jit.CudaHeaders(header.parent, f"{wheel} {major}.1")
    header.unlink()
    with pytest.raises(jit.CompilerMissing, match=rf"pip install deepcomm\[cu{major}\]"):
        jit.find_headers(major)
