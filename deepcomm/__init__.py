# SPDX-License-Identifier: Apache-2.0
"""Expert-parallel communication: move MoE tokens to their experts, and bring the outputs back."""

from deepcomm.buffer import Buffer
from deepcomm.config import BufferConfig
from deepcomm.errors import (
    CommError,
    CommTimeout,
    ConfigMismatch,
    CudaError,
    Error,
    InternalError,
    InvalidArgument,
    NcclError,
)
from deepcomm.sizing import buffer_bytes
from deepcomm.types import (
    BufferStats,
    CombineOutput,
    DispatchOutput,
    Event,
    Handle,
    RecvLayout,
    ScaledTensor,
)

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "BufferConfig",
    "BufferStats",
    "CombineOutput",
    "CommError",
    "CommTimeout",
    "ConfigMismatch",
    "CudaError",
    "DispatchOutput",
    "Error",
    "Event",
    "Handle",
    "InternalError",
    "InvalidArgument",
    "NcclError",
    "RecvLayout",
    "ScaledTensor",
    "buffer_bytes",
]
