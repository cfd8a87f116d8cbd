# SPDX-License-Identifier: Apache-2.0
"""Any kernel of the list, in any static configuration, as a library for the emulator."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emulated.build import CSRC, HERE, PLAIN, Variant, build_kernel

from deepcomm.jit import Kernel

MAX_THREADS = 1024
"""Of a block whose kernel says nothing."""

UNIT = """\
#include "{source}"

namespace deepcomm::kernels {{
{template}
struct EmulatedBounds {{
    static constexpr int kMaxThreads = {bounds};
}};
}}  // namespace deepcomm::kernels

using namespace deepcomm::kernels;

namespace {{

template <typename Params>
constexpr size_t params_bytes(void (*)(Params)) {{
    return sizeof(Params);
}}

template <typename Params>
void call(void (*kernel)(Params), const void* params) {{
    kernel(*static_cast<const Params*>(params));
}}

}}  // namespace

extern "C" {{
void deepcomm_kernel(const void* params) {{ call({name}{arguments}, params); }}
extern const size_t deepcomm_params_bytes = params_bytes({name}{arguments});
extern const size_t deepcomm_shared_bytes = {shared};
extern const int deepcomm_max_threads = EmulatedBounds{arguments}::kMaxThreads;
}}
"""


@dataclass(frozen=True)
class KernelLibrary:
    """A kernel, loaded: ``deepcomm.backends.cuda.runtime.Function``."""

    name: str
    max_threads: int
    blocks_per_sm: int
    shared_bytes: int
    params_bytes: int
    entry: int
    """Address of a C function of a pointer to the kernel's arguments."""
    library: ctypes.CDLL

    def spread_over(self, num_sms: int) -> None:
        """Blocks of the emulator lie nowhere."""


def load_kernel(kernel: Kernel, spec: Mapping[str, int], variant: Variant = PLAIN) -> KernelLibrary:
    """Build and load; the emulator's library is loaded before."""
    name = kernel.name
    stem = "-".join([name, *(f"{key}{int(value)}" for key, value in spec.items())])
    library = ctypes.CDLL(str(build_kernel(stem, unit_text(kernel, spec), variant)))

    def size(symbol: str) -> int:
        return ctypes.c_size_t.in_dll(library, f"deepcomm_{symbol}").value

    return KernelLibrary(
        name=name,
        max_threads=ctypes.c_int.in_dll(library, "deepcomm_max_threads").value,
        blocks_per_sm=1,
        shared_bytes=size("shared_bytes"),
        params_bytes=size("params_bytes"),
        entry=ctypes.cast(library.deepcomm_kernel, ctypes.c_void_p).value or 0,
        library=library,
    )


def unit_text(kernel: Kernel, spec: Mapping[str, int]) -> str:
    """Write the unit that instantiates a kernel and tells its sizes."""
    if list(spec) != [parameter.name for parameter in kernel.spec]:
        raise ValueError(f"spec of {kernel.name}: got {dict(spec)}")
    values = ", ".join(
        str(value).lower() if isinstance(value, bool) else str(value) for value in spec.values()
    )
    arguments = f"<{values}>" if values else "<>" * bool(kernel.spec)
    template, bounds = launch_bounds(source_of(kernel).read_text(), kernel.name)
    text = UNIT.format(
        source=kernel.source,
        name=kernel.name,
        template=template,
        bounds=bounds,
        arguments=arguments,
        shared=f"sizeof({kernel.shared}{arguments})" if kernel.shared else "0",
    )
    return text if template else text.replace("EmulatedBounds<>", "EmulatedBounds")


def source_of(kernel: Kernel) -> Path:
    """Return the file of a kernel: one of the project, or of these tests."""
    here = HERE / kernel.source
    return here if here.exists() else CSRC / kernel.source


def launch_bounds(source: str, name: str) -> tuple[str, str]:
    """Return a kernel's template header and the threads of its launch bounds, as written.

    The device layer of the emulator has no use for the bounds and drops them.
    """
    found = re.search(
        r"(template <[^;{}]*>\s*)?(?:extern \"C\" )?__global__ void\s*"
        rf"(?:__launch_bounds__\((?P<bounds>[^;{{}}]*)\)\s*)?{name}\(",
        source,
    )
    if found is None:
        raise ValueError(f"{name}: no such kernel")
    bounds = found["bounds"] or str(MAX_THREADS)
    depth = 0
    for index, char in enumerate(bounds):
        depth += (char in "(<") - (char in ")>")
        if char == "," and depth == 0:
            bounds = bounds[:index]
            break
    return (found[1] or "").strip(), bounds
