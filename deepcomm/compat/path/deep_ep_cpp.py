# SPDX-License-Identifier: Apache-2.0
"""What clients import from DeepEP's extension module."""

from deepcomm.compat import Config, EventHandle, topk_idx_t

__all__ = ["Config", "EventHandle", "topk_idx_t"]
