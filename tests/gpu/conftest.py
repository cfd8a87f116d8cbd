# SPDX-License-Identifier: Apache-2.0
"""What the driver must know before its first call, in this process and those that it starts."""

from __future__ import annotations

import os

# Ranks of one device launch on streams that must not share a hardware queue.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
# To load a kernel at its first launch may wait for those that run and wait for it.
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
