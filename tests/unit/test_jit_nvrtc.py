# SPDX-License-Identifier: Apache-2.0
"""NVRTC: every kernel compiles, without a GPU; specs, errors, figures."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from jit_project import SCALE, SPEC, write_project

from deepcomm import jit
from deepcomm.backends.cuda.network_choice import loaded_nccl_headers

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.nvrtc

ARCHS = ("sm_90a", "sm_100a")


@pytest.fixture
def real(tmp_path: Path) -> jit.KernelCompiler:
    root = write_project(tmp_path / "project")
    return jit.KernelCompiler(jit.find_nvrtc(), root, jit.DiskCache(tmp_path / "cache"))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernel, id=kernel.name, marks=[pytest.mark.nccl] * kernel.uses_nccl)
        for kernel in jit.KERNELS
    ],
)
def test_nvrtc_compiles_every_kernel_without_spills(
    kernel: jit.Kernel, arch: str, real: jit.KernelCompiler
) -> None:
    compiler = replace(real, root=jit.source_root())
    nccl = loaded_nccl_headers() if kernel.uses_nccl else None
    for spec in jit.spec_grid(kernel):
        compiled = compiler.compile(kernel, arch=arch, spec=spec, nccl=nccl)
        assert compiled.is_new
        assert compiled.usage is not None
        assert 0 < compiled.usage.num_registers < 256
        assert compiled.usage.spill_bytes == 0
        assert compiled.symbol.encode() + b"\0" in compiled.cubin


def table_ends(elf: bytes) -> list[int]:
    """Return where the program and the section headers of an ELF file end."""
    offsets = struct.unpack_from("<QQ", elf, 32)
    entries = struct.unpack_from("<HHHH", elf, 54)
    return [offsets[i] + entries[2 * i] * entries[2 * i + 1] for i in range(2)]


def test_nvrtc_cubin_is_a_whole_file(real: jit.KernelCompiler) -> None:
    cubin = real.compile(SCALE, arch="sm_90a", spec=SPEC).cubin
    assert cubin[:4] == b"\x7fELF"
    assert len(cubin) == max(table_ends(cubin))


@pytest.mark.parametrize("hidden", [1024, 7168])
def test_nvrtc_instantiates_the_spec(real: jit.KernelCompiler, hidden: int) -> None:
    kernels = [
        real.compile(SCALE, arch="sm_90a", spec={"hidden": hidden, "negate": negate})
        for negate in (False, True)
    ]
    assert {kernel.shared_bytes for kernel in kernels} == {4 * hidden}
    assert {kernel.max_threads for kernel in kernels} == {96}
    assert kernels[0].symbol != kernels[1].symbol
    assert all(str(hidden) in kernel.symbol for kernel in kernels)


def test_nvrtc_probe_shared_memory_is_its_struct(real: jit.KernelCompiler) -> None:
    # Two tiles of 64 words and two mbarriers of 8 bytes, in a struct aligned to 128.
    (kernel,) = (kernel for kernel in jit.KERNELS if kernel.name == "probe_bulk_put")
    compiled = replace(real, root=jit.source_root()).compile(kernel, arch="sm_90a")
    assert compiled.shared_bytes == -(-(2 * 64 * 4 + 2 * 8) // 128) * 128


@pytest.mark.parametrize(
    ("name", "awaits_ahead"),
    [("low_latency_dispatch", True), ("low_latency_combine", True), ("low_latency_mask", False)],
)
def test_nvrtc_kernels_that_may_be_launched_early(
    real: jit.KernelCompiler, name: str, awaits_ahead: bool
) -> None:
    (kernel,) = (kernel for kernel in jit.KERNELS if kernel.name == name)
    compiler = replace(real, root=jit.source_root())
    compiled = compiler.compile(kernel, arch="sm_90a", spec=next(jit.spec_grid(kernel, {})))
    assert compiled.awaits_ahead == awaits_ahead


def compile_body(compiler: jit.KernelCompiler, body: str, **options: Any) -> jit.CompiledKernel:
    """Compile a kernel ``scale(float* x)`` with the given body, on line 3 of its file."""
    text = f"namespace deepcomm::kernels {{\n__global__ void scale(float* x) {{\n{body}\n}}\n}}\n"
    head = options.pop("head", "")
    (compiler.root / SCALE.source).write_text(head + text)
    kernel = replace(SCALE, spec=(), shared=None, **options)
    return compiler.compile(kernel, arch="sm_90a")


@pytest.mark.parametrize("is_first", [True, False])
def test_nvrtc_kernel_that_touches_memory_first_is_not_launched_early(
    real: jit.KernelCompiler, is_first: bool
) -> None:
    lines = ['asm volatile("griddepcontrol.wait;" ::: "memory");', "*x += 1;"]
    compiled = compile_body(real, " ".join(lines if is_first else reversed(lines)))
    assert compiled.awaits_ahead == is_first


def test_nvrtc_errors_show_file_line_and_source(real: jit.KernelCompiler) -> None:
    with pytest.raises(jit.CompileError) as caught:
        compile_body(real, "*x = unheard_of + 1;")
    message = str(caught.value)
    assert 'kernels/scale.cuh(3): error: identifier "unheard_of" is undefined' in message
    assert "*x = unheard_of + 1;" in message
    assert message.startswith("deepcomm::kernels::scale for sm_90a (NVRTC ")
    assert real.cache.sizes() == []


def test_nvrtc_errors_name_a_missing_header(real: jit.KernelCompiler) -> None:
    with pytest.raises(jit.CompileError, match=r"scale.cuh\(1\).*absent/header.hpp"):
        compile_body(real, "", head='#include "absent/header.hpp"\n')


def test_nvrtc_errors_name_an_architecture_it_does_not_know(real: jit.KernelCompiler) -> None:
    with pytest.raises(jit.CompileError, match="arch"):
        real.compile(SCALE, arch="sm_11", spec=SPEC)


def test_nvrtc_finds_cudas_headers(real: jit.KernelCompiler) -> None:
    head = "#include <cuda_bf16.h>\n#include <cuda_fp8.h>\n"
    body = "*x = __bfloat162float(__float2bfloat16(*x)) + float(__nv_fp8_e4m3(*x));"
    assert compile_body(real, body, head=head).is_new


SPILLING = """
    float values[64];
    for (int i = 0; i < 64; ++i) values[i] = x[i * 32 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = values[63 - i] * values[i];
"""


def test_nvrtc_reports_spills_and_static_memory(real: jit.KernelCompiler) -> None:
    free = compile_body(real, SPILLING)
    bound = compile_body(real, SPILLING, options=("--maxrregcount=32",))
    assert free.usage is not None
    assert bound.usage is not None
    assert free.usage.spill_bytes == free.usage.stack_bytes == 0
    assert bound.usage.num_registers <= 32 < free.usage.num_registers
    assert bound.usage.spill_bytes >= 2 * bound.usage.stack_bytes > 0
    body = "__shared__ float tile[100]; tile[threadIdx.x] = *x; __syncthreads(); *x = tile[1];"
    static = compile_body(real, body).usage
    assert static is not None
    assert static.static_shared_bytes == 400


def test_nvrtc_options_of_a_kernel_reach_the_compiler(real: jit.KernelCompiler) -> None:
    with pytest.raises(jit.CompileError, match="no-such-option"):
        compile_body(real, "", options=("--no-such-option",))


def test_nvrtc_version_names_compiler_and_headers() -> None:
    assert jit.find_nvrtc() is jit.find_nvrtc()
    assert jit.find_nvrtc().version.startswith("NVRTC 1")
    assert "nvidia-cuda-runtime" in jit.find_nvrtc().version
