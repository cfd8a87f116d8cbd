# SPDX-License-Identifier: Apache-2.0
"""What launches need: NVRTC, and what the driver must know before its first call.

The variables are for this process and those that it starts.
"""

from __future__ import annotations

import os

import pytest

from deepcomm import jit

# Ranks of one device launch on streams that must not share a hardware queue.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# To load a kernel at its first launch may wait for those that run and wait for it.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


@pytest.hookimpl(trylast=True)  # the number of GPUs comes first
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        try:
            jit.find_nvrtc()
        except jit.CompilerMissing as error:
            pytest.skip(str(error))
