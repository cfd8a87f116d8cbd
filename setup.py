# SPDX-License-Identifier: Apache-2.0
"""Builds the one extension, ``deepcomm._C``: plain C++17, no torch, no CUDA, no NCCL."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCE_FOLDERS = ("csrc/common", "csrc/cpu", "csrc/cpu/simd", "csrc/bindings")
FLAGS = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden"]

sources = sorted(str(path) for folder in SOURCE_FOLDERS for path in Path(folder).glob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").rglob("*.hpp"))

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
            extra_link_args=["-lrt", "-lpthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
