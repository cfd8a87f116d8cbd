# SPDX-License-Identifier: Apache-2.0
"""Builds the one extension, ``deepcomm._C``: plain C++17, no torch, no CUDA, no NCCL.

The sources of the kernels, which are compiled at run time, become ``deepcomm/include``.
"""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE_FOLDERS = ("csrc/common", "csrc/cpu", "csrc/cpu/simd", "csrc/host", "csrc/bindings")
KERNEL_FOLDERS = ("csrc/common", "csrc/layout", "csrc/device", "csrc/kernels")
NO_KERNEL = Path("csrc/device/emu")  # the emulator's half of the device layer
FLAGS = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden"]

sources = sorted(str(path) for folder in SOURCE_FOLDERS for path in Path(folder).glob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").rglob("*.hpp"))
kernel_sources = [
    path
    for folder in KERNEL_FOLDERS
    for path in sorted(Path(folder).rglob("*"))
    if path.suffix in (".hpp", ".cuh") and NO_KERNEL not in path.parents
]


class BuildWithKernels(build_py):
    """Also copies the kernels; an editable installation reads them where they are."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        for source in () if self.editable_mode else kernel_sources:
            target = Path(self.build_lib, "deepcomm/include", *source.parts[1:])
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


ParallelCompile().install()  # one compiler a core

setup(
    ext_modules=[
        Pybind11Extension(
            "deepcomm._C",
            sources,
            include_dirs=["csrc"],
            depends=headers,
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-lrt", "-lpthread", "-ldl"],
        )
    ],
    cmdclass={"build_ext": build_ext, "build_py": BuildWithKernels},
)
