# SPDX-License-Identifier: Apache-2.0
"""NVRTC through CuPy's lowest layer, which needs no driver, and CUDA's headers from a wheel."""

from __future__ import annotations

import functools
import importlib.metadata
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deepcomm.errors import Error, InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CompileError",
    "CompilerMissing",
    "CudaHeaders",
    "Nvrtc",
    "Output",
    "Toolchain",
    "TranslationUnit",
    "find_headers",
    "find_nvrtc",
]

BASE_OPTIONS = (
    "-std=c++17",
    "-default-device",  # layout/ is plain constexpr, shared with the host
    "-lineinfo",  # profilers and sanitizers name source lines; the code is the same
    "--ptxas-options=-v",  # the log reports registers, memory and spills
)

ELF_TABLE_OFFSETS, ELF_TABLE_SIZES = 32, 54
"""Where a 64-bit ELF header says how far the file reaches."""

REMEDY = "pip install deepcomm[cu12], or deepcomm[cu13] where the driver is of CUDA 13"


class CompilerMissing(Error):
    """NVRTC or CUDA's headers are not installed; the message holds the remedy."""


class CompileError(InternalError):
    """A kernel does not compile: the message holds the compiler's, with file, line and source."""


@dataclass(frozen=True, slots=True)
class TranslationUnit:
    """What is compiled.

    Attributes:
        name: The file name in messages.
        text: The file itself.
        headers: Name as included, and text, of every project header.
        entry: The kernel, as a C++ name expression.
        arch: Such as ``sm_90a``.
        options: Beyond those of every unit.
    """

    name: str
    text: str
    headers: Mapping[str, str]
    entry: str
    arch: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What comes out.

    Attributes:
        cubin: Machine code, as the driver loads it.
        ptx: What it was assembled from.
        log: Warnings and the assembler's report.
        symbol: The kernel's name in the cubin.
    """

    cubin: bytes
    ptx: str
    log: str
    symbol: str


class Toolchain(Protocol):
    """A compiler of kernels."""

    @property
    def version(self) -> str:
        """Changes with anything that may change the output."""

    def compile(self, unit: TranslationUnit) -> Output:
        """Compile one unit; raises CompileError."""


@dataclass(frozen=True, slots=True)
class CudaHeaders:
    """CUDA's headers: the folder, and the wheel that they come from with its version."""

    folder: Path
    wheel: str


@dataclass(frozen=True, slots=True)
class Nvrtc:
    """NVRTC with the headers of its CUDA version.

    Attributes:
        module: ``cupy.cuda.nvrtc``.
        headers: Found once.
    """

    module: Any
    headers: CudaHeaders

    @property
    def version(self) -> str:
        """NVRTC's version, and that of the headers' wheel."""
        major, minor = self.module.getVersion()
        return f"NVRTC {major}.{minor}, {self.headers.wheel}"

    def compile(self, unit: TranslationUnit) -> Output:
        """Compile one unit.

        Raises:
            CompileError: With NVRTC's log.
        """
        nvrtc = self.module
        names = [name.encode() for name in unit.headers]
        texts = [text.encode() for text in unit.headers.values()]
        program = nvrtc.createProgram(unit.text, unit.name, texts, names)
        try:
            nvrtc.addNameExpression(program, unit.entry)
            nvrtc.compileProgram(program, self._options(unit))
            return Output(
                cubin=_whole_elf(nvrtc.getCUBIN(program)),
                ptx=nvrtc.getPTX(program).decode(),
                log=_log(nvrtc, program),
                symbol=nvrtc.getLoweredName(program, unit.entry),
            )
        except nvrtc.NVRTCError as error:
            log = _log(nvrtc, program) or str(error)
            raise CompileError(f"{unit.entry} for {unit.arch} ({self.version}):\n{log}") from None
        finally:
            nvrtc.destroyProgram(program)

    def _options(self, unit: TranslationUnit) -> tuple[str, ...]:
        include = f"-I{self.headers.folder}"
        return (*BASE_OPTIONS, f"-arch={unit.arch}", include, *unit.options)


@functools.cache
def find_nvrtc() -> Nvrtc:
    """Load NVRTC, once a process.

    Raises:
        CompilerMissing: CuPy, NVRTC or the headers are absent, or do not load.
    """
    try:
        from cupy.cuda import nvrtc

        major, _ = nvrtc.getVersion()
    # CuPy reports a library that it cannot load by several types, RuntimeError among them.
    except Exception as error:
        raise CompilerMissing(f"{_reason(error)}; {REMEDY}") from error
    return Nvrtc(nvrtc, find_headers(major))


def find_headers(major: int) -> CudaHeaders:
    """Find the headers of a major version of CUDA.

    Raises:
        CompilerMissing: Their wheel is not installed.
    """
    # Up to CUDA 12 the wheels' names carry the version, from 13 on their folders do.
    name = "nvidia-cuda-runtime" + (f"-cu{major}" if major < 13 else "")
    folder = "nvidia/cuda_runtime/include" if major < 13 else f"nvidia/cu{major}/include"
    try:
        wheel = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        wheel = None
    path = Path(str(wheel.locate_file(folder))) if wheel else None
    if wheel is None or path is None or not (path / "cuda_bf16.h").is_file():
        raise CompilerMissing(
            f"the headers of CUDA {major} are not installed (wheel {name}, {folder}); "
            f"pip install deepcomm[cu{major}]"
        )
    return CudaHeaders(path, f"{name} {wheel.version}")


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ("cupy", "cupy.cuda"):
        return "CuPy is not installed"
    return f"CuPy has no NVRTC: {str(error).strip()}"


def _log(nvrtc: Any, program: Any) -> str:
    return str(nvrtc.getProgramLog(program)).rstrip("\0 \n")


def _whole_elf(cubin: bytes) -> bytes:
    """Return a cubin with the last byte, a zero, that CuPy takes for the end of a string."""
    program_table, section_table = struct.unpack_from("<QQ", cubin, ELF_TABLE_OFFSETS)
    program_size, num_programs, section_size, num_sections = struct.unpack_from(
        "<HHHH", cubin, ELF_TABLE_SIZES
    )
    end = max(
        program_table + program_size * num_programs, section_table + section_size * num_sections
    )
    return cubin.ljust(end, b"\0")
