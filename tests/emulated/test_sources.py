# SPDX-License-Identifier: Apache-2.0
"""The kernels that run here are the kernels of the GPU, written with the device layer alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulated.build import CSRC, HERE

from deepcomm import jit

KERNELS = sorted((CSRC / "kernels").rglob("*.cuh"))
PORTABLE = sorted((CSRC / "device").glob("*.cuh")) + KERNELS
PAIRS = ("platform", "memory", "bulk", "collective", "arithmetic", "rail")

# What belongs to device/cuda alone: everything else would not run under the emulator.
FORBIDDEN = {
    "raw shared memory (use shared_storage)": re.compile(r"\b__shared__\b"),
    "inline assembly": re.compile(r"\basm\b"),
    "a CUDA barrier (use a group)": re.compile(r"\b__sync(threads|warp)\w*\("),
    "a CUDA collective (use warp_*)": re.compile(r"\b__(shfl|ballot|any|all|reduce|match)\w*\("),
    "a CUDA fence (use fence_*)": re.compile(r"\b__threadfence\w*\("),
    "a CUDA atomic (use red_* and atom_*)": re.compile(r"\batomic[A-Z]\w*\("),
    "volatile (use a strong operation)": re.compile(r"\bvolatile\b"),
    "a raw wait (use wait_until)": re.compile(r"\b(while|for)\s*\([^;)]*\b(ld_|mbarrier_try)"),
    "memcpy (no hook sees it)": re.compile(r"\bmem(cpy|set|move)\("),
}


def code_of(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text())


def test_every_kernel_is_run_by_the_emulator() -> None:
    tests = "\n".join(path.read_text() for path in HERE.glob("*.cpp"))
    kernels = {
        name
        for path in KERNELS
        for name in re.findall(r"__global__[^;{]*?\b(\w+)\(const __grid_constant__", code_of(path))
    }
    assert kernels == {kernel.name for kernel in jit.KERNELS}
    # The others are run by the backend: test_matrix.py has the list of what it launches.
    probes = {kernel.name for kernel in jit.KERNELS if kernel.source.startswith("kernels/probe/")}
    missing = {name for name in probes if not re.search(rf"kernels::{name}\(", tests)}
    assert not missing, f"no emulated test runs {missing}"


@pytest.mark.parametrize("what", FORBIDDEN)
def test_kernels_use_the_device_layer_only(what: str) -> None:
    offenders = [
        f"{path.relative_to(CSRC)}: {found[0]}"
        for path in PORTABLE
        for found in FORBIDDEN[what].finditer(code_of(path))
    ]
    assert not offenders, f"{what}: {offenders}"


def defined_names(path: Path) -> set[str]:
    """Functions of a device header, those of macros with the scope left open (ld_relaxed_*)."""
    code = re.sub(r"(scope|suffix)\b", "*", code_of(path).replace("##", ""))
    functions = re.findall(
        r"^(?:\[\[noreturn\]\] )?(?:DEEPCOMM_DEVICE|inline) [\w&]+ (\w+)\(", code, re.M
    )
    generated = re.findall(r"\b((?:ld|st|red|atom)_\w+_)\*", code)
    return set(functions) | set(generated)


# Helpers of one side that no kernel may use.
PRIVATE = {"shared_address", "copy_synchronously", "load", "store", "rmw", "shuffle", "name"}


@pytest.mark.parametrize("stem", PAIRS)
def test_both_implementations_define_the_same_names(stem: str) -> None:
    cuda = defined_names(CSRC / "device" / "cuda" / f"{stem}.cuh") - PRIVATE
    emulated = defined_names(CSRC / "device" / "emu" / f"{stem}.cuh") - PRIVATE
    assert cuda == emulated
    assert len(cuda) >= 3
