# SPDX-License-Identifier: Apache-2.0
"""NCCL's headers for NVRTC: where they are looked for, how they are adapted, and that it holds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from deepcomm import jit
from deepcomm.backends.cuda.network_choice import loaded_nccl_headers
from deepcomm.errors import InvalidArgument
from deepcomm.jit.nccl_sources import adapt, collect_nccl
from deepcomm.jit.toolchain import TranslationUnit

NCCL_H = "#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7\n"
PROXY = "nccl_device/gin/proxy/gin_proxy_device_host_common.h"
WORDS = {
    "completion": "{1, 0x2bcdef, 0xabcdef, 0x7788}",
    "signalVal": "{1, 1, 0x2a, 0x1122, 0x33445566}",
    "headerExt": "{1, 0x55, 0x1234, 0x56, 0x789abcde}",
    "inlineLow": "{1, 0x33, 0x01020304, 0x0506}",
    "header": "{1, 9, 2, 0x123456789abcd}",
    "srcOff": "{1, 0x123456789abcdef}",
}
"""Structs that NCCL's host code reads from the kernel's words, and values of their fields."""


def write_nccl(folder: Path, text: str = NCCL_H) -> Path:
    include = folder / "include"
    (include / "nccl_device/impl").mkdir(parents=True)
    (include / "nccl.h").write_text(text)
    (include / "nccl_device.h").write_text('#include "nccl_device/impl/a.h"\n')
    (include / "nccl_device/impl/a.h").write_text('#include <nccl.h>\n#include "../b.h"\n')
    (include / "nccl_device/b.h").write_text("#include <cuda.h>\n")
    return include


# Adapted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "struct { int a:1; } __attribute__((packed)) b;",
            "struct __attribute__((packed)) { int a:1; } b;",
        ),
        (
            "union U { struct { int a; } b; } __attribute__((__packed__)) __attribute__((x(8)));",
            "union __attribute__((__packed__)) __attribute__((x(8))) U { struct { int a; } b; } ;",
        ),
        ("if (a) { b(); } c();", "if (a) { b(); } c();"),
        ("__host__ int f();", "int f();"),
        ("__host__ __device__ int f();", "__host__ __device__ int f();"),
        ("int part[sizeof(T) / 8];", "int part[(sizeof(T) + 8 - 1) / 8];"),
        (
            "#define TYPEOF(x) decltype(x)",
            "#define TYPEOF(x) cuda::std::remove_reference_t<decltype(x)>",
        ),
    ],
)
def test_headers_mean_to_nvrtc_what_they_mean_to_nvcc(text: str, expected: str) -> None:
    assert re.sub(r"\s+", " ", adapt(text)) == expected


def test_headers_name_each_other_from_their_folder(tmp_path: Path) -> None:
    assert collect_nccl(write_nccl(tmp_path)) == {
        "nccl.h": NCCL_H,
        "nccl_device.h": '#include "nccl_device/impl/a.h"\n',
        "nccl_device/b.h": "#include <cuda.h>\n",
        "nccl_device/impl/a.h": '#include "nccl.h"\n#include "nccl_device/b.h"\n',
    }


# Found


@pytest.mark.nvrtc
def test_headers_are_beside_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    include = write_nccl(tmp_path / "nccl")
    library = str(tmp_path / "nccl/lib/libnccl.so.2")
    found = jit.find_nccl_headers(library, "2.30.7")
    assert (found.folder, found.version) == (include, "2.30.7")
    assert (found.libcudacxx / "cuda/std/cstdint").is_file()

    elsewhere = write_nccl(tmp_path / "other")
    monkeypatch.setenv("DEEPCOMM_NCCL_INCLUDE", str(elsewhere))
    assert jit.find_nccl_headers(library, "2.30.7").folder == elsewhere


def test_headers_of_another_version_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    include = write_nccl(tmp_path / "nccl")
    with pytest.raises(jit.HeadersMissing) as caught:
        jit.find_nccl_headers(str(tmp_path / "nccl/lib/libnccl.so.2"), "2.32.3")
    assert f"expected those of 2.32.3, the version of {tmp_path}/nccl/lib" in str(caught.value)
    assert f"{include} has those of 2.30.7" in str(caught.value)
    assert "set DEEPCOMM_NCCL_INCLUDE" in str(caught.value)

    monkeypatch.setenv("DEEPCOMM_NCCL_INCLUDE", str(tmp_path / "none"))
    with pytest.raises(InvalidArgument, match="DEEPCOMM_NCCL_INCLUDE: expected a folder, got"):
        jit.find_nccl_headers("libnccl.so.2", "2.30.7")


# Layouts


def of_the_host(folder: Path, nccl: Path) -> dict[str, str]:
    """Return the words as the host's compiler, and so NCCL's, lays them out."""
    lines = [
        f"{{ decltype(ncclGinProxyQword_t::{name}) word = {value}; show(&word, sizeof(word)); }}"
        for name, value in WORDS.items()
    ]
    source = folder / "words.cpp"
    source.write_text(
        f'#include <cstdio>\n#include "{PROXY}"\nstatic void show(const void* at, int size) {{\n'
        'for (int i = 0; i < size; ++i) std::printf("%02x", ((const unsigned char*)at)[i]);\n'
        'std::printf("\\n"); }\nint main() {\n' + "\n".join(lines) + "\n}\n"
    )
    program = folder / "words"
    subprocess.run(["g++", f"-I{nccl}", str(source), "-o", str(program)], check=True)
    said = subprocess.check_output([str(program)], text=True).split()
    return dict(zip(WORDS, said, strict=True))


@pytest.mark.nvrtc
@pytest.mark.nccl
def test_kernels_lay_words_out_as_nccls_host_code_reads_them(tmp_path: Path) -> None:
    nccl = loaded_nccl_headers()
    text = nccl.preamble + f'#include "{PROXY}"\nextern "C" __global__ void none() {{}}\n'
    text += "".join(
        f"__device__ const decltype(ncclGinProxyQword_t::{name}) deepcomm_{name}[] = {{{value}}};\n"
        for name, value in WORDS.items()
    )
    unit = TranslationUnit("words.cu", text, nccl.texts, "none", "sm_90a", nccl.options)
    ptx = jit.find_nvrtc().compile(unit).ptx
    found = {}
    for name in WORDS:
        written = re.search(rf"deepcomm_{name}\[(\d+)\] = {{([\d, ]+)}}", ptx)
        assert written, name
        content = bytes(map(int, written[2].split(",")))
        found[name] = content.ljust(int(written[1]), b"\0").hex()
    assert found == of_the_host(tmp_path, nccl.folder)
