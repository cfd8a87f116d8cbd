# SPDX-License-Identifier: Apache-2.0
"""Where NCCL's headers are, and what else kernels need that include them."""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deepcomm.env import nccl_include
from deepcomm.jit.nccl_sources import SHIMS, collect_nccl
from deepcomm.jit.toolchain import CompilerMissing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["HeadersMissing", "NcclHeaders", "find_nccl_headers"]

OPTIONS: Final = ("-DNCCL_GIN_EFA_GDA_ENABLE=0", "-DNCCL_GIN_GPI_ENABLE=0")
"""Backends of GIN that need a compiler for the host."""
PREAMBLE: Final = "#include <cuda/std/cstdint>\n#include <cuda/std/type_traits>\n"
VERSION = re.compile(r"^#define NCCL_(MAJOR|MINOR|PATCH) (\d+)$", re.MULTILINE)
LIBCUDACXX: Final = "cuda/std/cstdint"


class HeadersMissing(CompilerMissing):
    """NCCL's headers, or libcu++'s, are not there; the message says where they were looked for."""


@dataclass(frozen=True, slots=True)
class NcclHeaders:
    """NCCL's device headers, of one version.

    Attributes:
        folder: Where they are.
        version: Such as ``2.30.7``.
        texts: Name and text of each, and of shims, as NVRTC compiles them.
        libcudacxx: The folder of libcu++.
        label: Says of which version that is.
    """

    folder: Path
    version: str
    texts: Mapping[str, str]
    libcudacxx: Path
    label: str

    @property
    def options(self) -> tuple[str, ...]:
        """Options of the compiler for kernels that include them."""
        return (f"-I{self.libcudacxx}", *OPTIONS)

    @property
    def preamble(self) -> str:
        """What such a kernel begins with."""
        return f"// libcu++: {self.label}\n{PREAMBLE}"


def find_nccl_headers(library: str, version: str) -> NcclHeaders:
    """Find the headers of a libnccl.

    Args:
        library: Its file; its headers are beside it or beside its folder.
        version: Which they must be of.

    Raises:
        HeadersMissing: There are none, or they are of other versions.
        InvalidArgument: DEEPCOMM_NCCL_INCLUDE is no folder.
    """
    return _read(library, version, nccl_include())


@functools.cache
def _read(library: str, version: str, chosen: Path | None) -> NcclHeaders:
    seen = []
    for folder in [chosen] if chosen else list(_folders(Path(library))):
        found = version_in(folder)
        if found == version:
            libcudacxx, label = find_libcudacxx()
            texts = {**SHIMS, **collect_nccl(folder)}
            return NcclHeaders(folder, version, texts, libcudacxx, label)
        seen.append(f"{folder} has {'none' if found is None else f'those of {found}'}")
    raise HeadersMissing(
        f"NCCL's device headers: expected those of {version}, the version of {library}, but "
        f"{'; '.join(seen)}; set DEEPCOMM_NCCL_INCLUDE to the folder that has nccl_device.h"
    )


def _folders(library: Path) -> Iterator[Path]:
    """Return where the headers of a library may be: in a wheel, of a package of the system."""
    for path in dict.fromkeys((library, library.resolve())):
        yield path.parent.parent / "include"
        yield path.parent / "include"
    if path.parent.is_relative_to("/usr"):
        yield Path("/usr/include")


def version_in(folder: Path) -> str | None:
    """Return the version of the headers in a folder, None where it lacks those of the device."""
    try:
        text = (folder / "nccl.h").read_text()
    except OSError:
        return None
    numbers = dict(VERSION.findall(text))
    if len(numbers) < len(("major", "minor", "patch")):
        return None
    if not (folder / "nccl_device.h").is_file():
        return None
    return ".".join(numbers[name] for name in ("MAJOR", "MINOR", "PATCH"))


def find_libcudacxx() -> tuple[Path, str]:
    """Return the folder of libcu++, and of what version it is.

    Raises:
        HeadersMissing: There is none.
    """
    seen = []
    for package, inner in (
        ("cupy", "_core/include/cupy/_cccl/libcudacxx"),
        ("nvidia.cuda_cccl", "include"),
        ("nvidia.cu13", "include/cccl"),
    ):
        for base in _locations(package):
            folder = base / inner
            if (folder / LIBCUDACXX).is_file():
                return folder, f"{package} {_version_of(folder)}"
            seen.append(str(folder))
    raise HeadersMissing(
        f"libcu++'s headers: expected {LIBCUDACXX} in one of {', '.join(seen) or 'CuPy'}, got "
        "none; pip install nvidia-cuda-cccl-cu12, or nvidia-cuda-cccl for CUDA 13"
    )


def _locations(package: str) -> list[Path]:
    """Return the folders of a package; looks, and imports nothing but what it is inside of."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return []
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def _version_of(folder: Path) -> str:
    """Return the version that a libcu++ says to be of."""
    for name in ("cuda/std/__cccl/version.h", "cuda/std/detail/libcxx/include/__config"):
        if (path := folder / name).is_file():
            for line in path.read_text().splitlines():
                if line.startswith("#define CCCL_VERSION "):
                    return line.split()[-1]
    return "of unknown version"
