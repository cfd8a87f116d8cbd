# SPDX-License-Identifier: Apache-2.0
"""Kernels at run time: the packaged sources, compiled by NVRTC and kept on disk.

``KernelCompiler`` gives a kernel for one architecture and one static configuration. Neither a GPU
nor a driver nor a CUDA toolkit is needed: NVRTC comes through CuPy, CUDA's headers from a wheel
(``pip install deepcomm[cu12]``). Importing this package loads neither.
"""

from deepcomm.jit.cache import DiskCache
from deepcomm.jit.compiler import CompiledKernel, KernelCompiler, default_compiler, kernel_cache
from deepcomm.jit.kernels import KERNELS, Kernel, SpecParameter, spec_grid
from deepcomm.jit.nccl_headers import HeadersMissing, NcclHeaders, find_nccl_headers
from deepcomm.jit.sources import source_root
from deepcomm.jit.toolchain import (
    CompileError,
    CompilerMissing,
    CudaHeaders,
    Nvrtc,
    Toolchain,
    TranslationUnit,
    find_headers,
    find_nvrtc,
)
from deepcomm.jit.usage import Usage

__all__ = [
    "KERNELS",
    "CompileError",
    "CompiledKernel",
    "CompilerMissing",
    "CudaHeaders",
    "DiskCache",
    "HeadersMissing",
    "Kernel",
    "KernelCompiler",
    "NcclHeaders",
    "Nvrtc",
    "SpecParameter",
    "Toolchain",
    "TranslationUnit",
    "Usage",
    "default_compiler",
    "find_headers",
    "find_nccl_headers",
    "find_nvrtc",
    "kernel_cache",
    "source_root",
    "spec_grid",
]
