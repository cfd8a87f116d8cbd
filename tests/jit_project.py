# SPDX-License-Identifier: Apache-2.0
"""A very small project, one kernel with two compile-time choices, and a compiler of nothing."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deepcomm import jit
from deepcomm.jit.toolchain import Output

if TYPE_CHECKING:
    from pathlib import Path

REPORT = """\
ptxas info    : 41 bytes gmem
ptxas info    : Compiling entry function 'scale' for 'sm_90a'
ptxas info    : Function properties for scale
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
"""

SCALE = jit.Kernel(
    "scale",
    "kernels/scale.cuh",
    shared="ScaleShared",
    spec=(jit.SpecParameter("hidden", (1024, 7168)), jit.SpecParameter("negate", (False, True))),
)
PROJECT = {
    "common/int.hpp": "#pragma once\nusing int32_t = int;\n",
    "device/emu/memory.cuh": "#error the emulator's\n",
    "kernels/other.cuh": "// nobody includes this\n",
    "kernels/scale.cuh": """\
        #pragma once
        #include "common/int.hpp"
        #if 0
        #include "device/emu/memory.cuh"
        #endif
        namespace deepcomm::kernels {
        template <int32_t kHidden, bool kNegate>
        struct ScaleShared {
            float row[kHidden];
        };
        template <int32_t kHidden, bool kNegate>
        __global__ void __launch_bounds__(96) scale(float* x) {
            extern __shared__ char raw[];
            auto& smem = *reinterpret_cast<ScaleShared<kHidden, kNegate>*>(raw);
            smem.row[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            x[threadIdx.x] = kNegate ? -smem.row[kHidden - 1] : smem.row[0];
        }
        }  // namespace deepcomm::kernels
    """,
}
SPEC = {"hidden": 1024, "negate": False}


def write_project(root: Path, **changes: str) -> Path:
    for name, text in (PROJECT | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


@dataclass
class FakeToolchain:
    """Gives what it was given, and counts."""

    version: str = "fake 1.0"
    ptx: str = ".maxntid 96, 1, 1\n.global .align 4 .u32 deepcomm_shared_bytes = 640;\n"
    log: str = REPORT
    units: list[jit.TranslationUnit] = field(default_factory=list)

    def compile(self, unit: jit.TranslationUnit) -> Output:
        self.units.append(unit)
        return Output(unit.text.encode() + b"\n\0\xff", self.ptx, self.log, "symbol")
