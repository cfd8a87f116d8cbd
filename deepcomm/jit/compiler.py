# SPDX-License-Identifier: Apache-2.0
"""From an entry of the list of kernels to machine code: the unit, its key, the cache."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deepcomm.env import cache_dir
from deepcomm.errors import InvalidArgument
from deepcomm.jit.cache import DiskCache
from deepcomm.jit.sources import collect, source_root
from deepcomm.jit.toolchain import (
    CompileError,
    Output,
    Toolchain,
    TranslationUnit,
    find_nvrtc,
)
from deepcomm.jit.usage import Usage, parse_usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deepcomm.jit.kernels import Kernel
    from deepcomm.jit.nccl_headers import NcclHeaders

__all__ = ["CompiledKernel", "KernelCompiler", "default_compiler", "kernel_cache"]

NAMESPACE = "deepcomm::kernels"
ARCH = re.compile(r"sm_\d{2,3}[af]?")
SHARED_BYTES = "deepcomm_shared_bytes"
SHARED_BYTES_VALUE = re.compile(rf"\b{SHARED_BYTES} = (\d+);")
MAX_THREADS = re.compile(r"^\.maxntid (\d+)", re.MULTILINE)
DYNAMIC_SHARED = ".extern .shared"
AWAITS_AHEAD = "griddepcontrol.wait"
TOUCHES_MEMORY = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:ld(?!\.param\b)|ldu|st|atom|red|cp|call)\b", re.MULTILINE
)
FACTS = 3
"""Goes up with what is stored of a kernel beside its code."""


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel for one architecture and one static configuration.

    Attributes:
        name: As in the list of kernels.
        arch: Such as ``sm_90a``.
        spec: Its compile-time choices.
        symbol: Its name in the cubin.
        cubin: Machine code, as the driver loads it.
        shared_bytes: Dynamic shared memory to launch with.
        max_threads: Threads a block that it may be launched with; None: the device's limit.
        awaits_ahead: Whether it awaits the kernel ahead of it on its stream itself, before it
            touches memory, and may be launched before that one has ended.
        constants: Bytes of those that it shows to the host, by name.
        usage: What it takes of an SM; None where the compiler's report could not be read.
        is_new: Whether it was compiled just now rather than found in the cache.
    """

    name: str
    arch: str
    spec: Mapping[str, int]
    symbol: str
    cubin: bytes
    shared_bytes: int
    max_threads: int | None
    awaits_ahead: bool
    constants: Mapping[str, bytes]
    usage: Usage | None
    is_new: bool


@dataclass(frozen=True, slots=True)
class KernelCompiler:
    """Compiles kernels, or finds them in the cache.

    Attributes:
        toolchain: What compiles.
        root: Folder of the sources.
        cache: Keeps what was compiled.
    """

    toolchain: Toolchain
    root: Path
    cache: DiskCache

    def compile(
        self,
        kernel: Kernel,
        *,
        arch: str,
        spec: Mapping[str, int] | None = None,
        nccl: NcclHeaders | None = None,
    ) -> CompiledKernel:
        """Return a kernel, compiled unless the cache has it.

        Args:
            kernel: Entry of the list.
            arch: Such as ``sm_90a``.
            spec: A value for each of the kernel's parameters.
            nccl: NCCL's headers, for a kernel that uses them.

        Raises:
            InvalidArgument: ``arch`` or ``spec`` is not of the form expected, or headers lack.
            CompileError: The kernel does not compile.
        """
        spec = dict(spec or {})
        key, unit = self._unit(kernel, arch, spec, nccl)
        stored, is_new = self.cache.get_or_build(key, lambda: self._build(kernel, unit))
        head, _, cubin = stored.partition(b"\n")
        facts = json.loads(head)
        usage, constants = facts.pop("usage"), facts.pop("constants")
        return CompiledKernel(
            name=kernel.name,
            arch=arch,
            spec=spec,
            cubin=cubin,
            constants={name: bytes.fromhex(text) for name, text in constants.items()},
            usage=Usage(**usage) if usage else None,
            is_new=is_new,
            **facts,
        )

    def has(
        self,
        kernel: Kernel,
        *,
        arch: str,
        spec: Mapping[str, int] | None = None,
        nccl: NcclHeaders | None = None,
    ) -> bool:
        """Return whether the cache has a kernel; arguments as for ``compile``.

        Raises:
            InvalidArgument: As ``compile`` does.
        """
        key, _ = self._unit(kernel, arch, dict(spec or {}), nccl)
        return self.cache.load(key) is not None

    def _unit(
        self, kernel: Kernel, arch: str, spec: Mapping[str, int], nccl: NcclHeaders | None
    ) -> tuple[str, TranslationUnit]:
        """Return what is compiled, after its key in the cache."""
        _check(kernel, arch, spec)
        unit = _translation_unit(kernel, arch, spec, self.root)
        if kernel.uses_nccl:
            unit = _with_nccl(unit, nccl)
        return f"{kernel.name}-{arch}-{_digest(unit, self.toolchain.version)}", unit

    def _build(self, kernel: Kernel, unit: TranslationUnit) -> bytes:
        """Compile, and return a line of facts followed by the cubin."""
        output = self.toolchain.compile(unit)
        if kernel.shared is None and DYNAMIC_SHARED in output.ptx:
            raise CompileError(
                f"{kernel.name}: uses dynamic shared memory; name its struct in the list of kernels"
            )
        head = json.dumps(_facts(kernel, output)).encode()
        return head + b"\n" + output.cubin


def default_compiler() -> KernelCompiler:
    """Return NVRTC with the package's sources and the user's cache.

    Raises:
        CompilerMissing: NVRTC or CUDA's headers are not installed.
    """
    return KernelCompiler(find_nvrtc(), source_root(), kernel_cache())


def kernel_cache() -> DiskCache:
    """Return the user's cache of kernels."""
    return DiskCache(cache_dir() / "kernels")


def _check(kernel: Kernel, arch: str, spec: Mapping[str, int]) -> None:
    if not ARCH.fullmatch(arch):
        raise InvalidArgument(f"arch: expected one such as sm_90a, got {arch!r}")
    expected = [parameter.name for parameter in kernel.spec]
    if sorted(spec) != sorted(expected):
        raise InvalidArgument(f"spec of {kernel.name}: expected {expected}, got {list(spec)}")


def _translation_unit(
    kernel: Kernel, arch: str, spec: Mapping[str, int], root: Path
) -> TranslationUnit:
    """Write the unit that instantiates the kernel and lets the host know its shared memory."""
    values = ", ".join(_literal(spec[parameter.name]) for parameter in kernel.spec)
    arguments = f"<{values}>" if values else ""
    text = f'#include "{kernel.source}"\n'
    if kernel.shared is not None:
        shared = f"{NAMESPACE}::{kernel.shared}{arguments}"
        text += f'extern "C" __device__ const unsigned {SHARED_BYTES} = sizeof({shared});\n'
    return TranslationUnit(
        name=f"{kernel.name}.cu",
        text=text,
        headers=collect(root, kernel.source),
        entry=f"{NAMESPACE}::{kernel.name}{arguments}",
        arch=arch,
        options=kernel.options,
    )


def _literal(value: int) -> str:
    # An integer is no template argument of type bool.
    return str(value).lower() if isinstance(value, bool) else str(int(value))


def _digest(unit: TranslationUnit, version: str) -> str:
    return hashlib.sha256(json.dumps([FACTS, version, asdict(unit)]).encode()).hexdigest()[:32]


def _with_nccl(unit: TranslationUnit, nccl: NcclHeaders | None) -> TranslationUnit:
    """Return a unit that finds NCCL's headers."""
    if nccl is None:
        raise InvalidArgument(f"nccl: expected NCCL's headers for {unit.name}, got None")
    return replace(
        unit,
        text=nccl.preamble + unit.text,
        headers={**nccl.texts, **unit.headers},
        options=(*unit.options, *nccl.options),
    )


def _constant(name: str, ptx: str) -> bytes:
    """Return the bytes of a global constant, which PTX writes without the zeros at the end.

    Raises:
        CompileError: There is none of the name.
    """
    found = re.search(rf"\.b8 deepcomm_{name}\[(\d+)\] = {{([\d, ]*)}};", ptx)
    if found is None:
        raise CompileError(f"{name}: expected a constant of bytes, got none")
    return bytes(map(int, found[2].split(","))).ljust(int(found[1]), b"\0")


def _awaits_ahead(ptx: str) -> bool:
    before, awaits, _ = ptx.partition(AWAITS_AHEAD)
    body = before.rpartition(".entry")[2]
    return bool(awaits) and TOUCHES_MEMORY.search(body) is None


def _facts(kernel: Kernel, output: Output) -> dict[str, object]:
    shared, threads = SHARED_BYTES_VALUE.search(output.ptx), MAX_THREADS.search(output.ptx)
    usage = parse_usage(output.log)
    return {
        "symbol": output.symbol,
        "shared_bytes": int(shared.group(1)) if shared else 0,
        "max_threads": int(threads.group(1)) if threads else None,
        "awaits_ahead": _awaits_ahead(output.ptx),
        "constants": {name: _constant(name, output.ptx).hex() for name in kernel.constants},
        "usage": asdict(usage) if usage else None,
    }
