# SPDX-License-Identifier: Apache-2.0
"""Checks of driver, GPUs and NVRTC; nothing is loaded that could take this process down."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deepcomm import jit
from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["absent", "check_driver", "check_gpus", "check_kernels", "check_nvrtc"]

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
NVIDIA_PCI = "0x10de"
NVRTC_TIMEOUT_S = 60
NVRTC_PROGRAM = "from cupy.cuda import nvrtc; print('.'.join(map(str, nvrtc.getVersion())))"
EXTRA_REMEDY = "pip install deepcomm[cu12] or deepcomm[cu13], after the driver's CUDA version"
CACHE_REMEDY = "set DEEPCOMM_CACHE_DIR to a folder that can be written; deepcomm compile fills it"
SECTION = "cuda"


def check_driver() -> Iterator[Finding]:
    """Look for the kernel module and the driver library."""
    name = "driver"
    module = _first_line(DRIVER_VERSION)
    version = _driver_cuda_version()
    if module is None and version is None:
        if _has_nvidia_device():
            remedy = "install the NVIDIA driver; containers: docker run --gpus all"
            yield Finding(SECTION, name, Status.WARN, "an NVIDIA device without driver", remedy)
        else:
            yield Finding(SECTION, name, Status.INFO, "no NVIDIA GPU: the CPU backend is used")
        return
    if version is None:
        remedy = "containers: docker run --gpus all (NVIDIA container toolkit)"
        yield Finding(SECTION, name, Status.WARN, "libcuda.so.1 cannot be loaded", remedy)
        return
    detail = f"CUDA {version // 1000}.{version % 1000 // 10}"
    yield Finding(SECTION, name, Status.OK, f"{detail}, {module}" if module else detail)


def check_gpus() -> Iterator[Finding]:
    """Look at what torch makes of the GPUs, and at peer access between them."""
    built = torch.version.cuda
    if not torch.cuda.is_available():
        if DRIVER_VERSION.exists():
            remedy = "install a torch built for the driver's CUDA version"
            detail = f"torch finds no GPU (it is built for CUDA {built or 'none'})"
            yield Finding(SECTION, "torch", Status.WARN, detail, remedy)
        else:
            yield Finding(SECTION, "torch", Status.INFO, f"built for CUDA {built or 'none'}")
        return
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    yield Finding(SECTION, "torch", Status.OK, f"CUDA {built}, {count} x {names}")
    yield _peer_access(count)


def _peer_access(count: int) -> Finding:
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    refused = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if refused:
        detail = f"refused between {len(refused)} of {len(pairs)} pairs, first {refused[0]}"
        remedy = "check nvidia-smi topo -p2p r; IOMMU or a virtual machine may forbid it"
        return Finding(SECTION, "peer access", Status.WARN, detail, remedy)
    detail = f"between all {len(pairs)} pairs" if pairs else "one GPU only"
    return Finding(SECTION, "peer access", Status.OK, detail)


def check_nvrtc() -> Iterator[Finding]:
    """Ask CuPy for NVRTC's version, in another process, and look for the headers it needs."""
    name = "NVRTC"
    if importlib.util.find_spec("cupy") is None:
        yield absent(name, "CuPy is not installed")
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", NVRTC_PROGRAM],
            capture_output=True,
            text=True,
            timeout=NVRTC_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding(SECTION, name, Status.WARN, f"no answer in {NVRTC_TIMEOUT_S} s", EXTRA_REMEDY)
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        yield Finding(SECTION, name, Status.WARN, reason, EXTRA_REMEDY)
        return
    version = done.stdout.strip()
    yield Finding(SECTION, name, Status.OK, f"{version} through CuPy")
    try:
        headers = jit.find_headers(int(version.partition(".")[0]))
    except jit.CompilerMissing as error:
        yield Finding(SECTION, "CUDA headers", Status.WARN, str(error), EXTRA_REMEDY)
    else:
        yield Finding(SECTION, "CUDA headers", Status.OK, headers.wheel)


def check_kernels() -> Iterator[Finding]:
    """Look for the kernels' sources, and at the folder that keeps what was compiled."""
    try:
        detail = f"{len(jit.KERNELS)} sources in {jit.source_root()}"
        yield Finding(SECTION, "kernels", Status.OK, detail)
    except Error as error:
        yield Finding(SECTION, "kernels", Status.WARN, str(error), "pip install deepcomm again")
    name = "kernel cache"
    try:
        cache = jit.kernel_cache()
        sizes = cache.sizes()
    except (Error, OSError) as error:
        yield Finding(SECTION, name, Status.WARN, str(error), CACHE_REMEDY)
        return
    detail = f"{len(sizes)} compiled, {sum(sizes) / 1e6:.1f} MB in {cache.folder}"
    if _can_write(cache.folder):
        yield Finding(SECTION, name, Status.OK, detail)
    else:
        detail += ", which cannot be written: every process compiles for itself"
        yield Finding(SECTION, name, Status.WARN, detail, CACHE_REMEDY)


def absent(name: str, detail: str) -> Finding:
    """Report what only a machine with a GPU needs."""
    if DRIVER_VERSION.exists():
        return Finding(SECTION, name, Status.WARN, detail, EXTRA_REMEDY)
    return Finding(SECTION, name, Status.INFO, detail)


def _driver_cuda_version() -> int | None:
    """Return the CUDA version of the driver, 1000 * major + 10 * minor, None without driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _can_write(folder: Path) -> bool:
    """Return whether a folder can be written, or made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _has_nvidia_device() -> bool:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(_first_line(vendor) == NVIDIA_PCI for vendor in vendors)


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
