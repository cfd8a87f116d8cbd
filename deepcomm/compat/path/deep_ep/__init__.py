# SPDX-License-Identifier: Apache-2.0
"""DeepEP's interface, answered by deepcomm. There is no ``HybridEPBuffer``: importing it fails."""

from deepcomm.compat import DEEP_EP_VERSION as __version__
from deepcomm.compat import (
    Buffer,
    Config,
    ElasticBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
    topk_idx_t,
)

from . import buffers, legacy, utils

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "buffers",
    "legacy",
    "topk_idx_t",
    "utils",
]
