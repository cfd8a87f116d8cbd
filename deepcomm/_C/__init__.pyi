# SPDX-License-Identifier: Apache-2.0
# Generated from the built extension by `python .ci/stub.py`; do not edit.
from . import cpu as cpu
from . import cuda as cuda
from . import kernels as kernels
from . import nccl as nccl
from . import simd as simd
from . import slots as slots
