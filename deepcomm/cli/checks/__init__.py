# SPDX-License-Identifier: Apache-2.0
"""The checks of ``deepcomm doctor``, each a function that yields findings about one section."""

from deepcomm.cli.checks.gpu import (
    check_driver,
    check_gpus,
    check_kernels,
    check_nvrtc,
)
from deepcomm.cli.checks.gpu_memory import check_gpu_memory
from deepcomm.cli.checks.host import check_python, check_shared_memory
from deepcomm.cli.checks.nccl import check_gin, check_nccl
from deepcomm.cli.checks.network import check_gloo, check_interfaces

__all__ = ["CHECKS"]

CHECKS = (
    ("python", check_python),
    ("memory", check_shared_memory),
    ("network", check_interfaces),
    ("network", check_gloo),
    ("cuda", check_driver),
    ("cuda", check_gpus),
    ("cuda", check_gpu_memory),
    ("cuda", check_nvrtc),
    ("cuda", check_kernels),
    ("cuda", check_nccl),
    ("cuda", check_gin),
)
"""Section and function of each check, in the order of the report."""
