# SPDX-License-Identifier: Apache-2.0
"""Facades for programs written against DeepEP: V1 ``Buffer`` and V2 ``ElasticBuffer``.

They speak DeepEP's calls over the public interface of deepcomm, on CPUs as on GPUs.
``install_as_deep_ep`` lets ``import deep_ep`` find them.
"""

import torch

from deepcomm import __version__ as _deepcomm_version
from deepcomm.compat.buffer import Buffer
from deepcomm.compat.config import Config
from deepcomm.compat.elastic import ElasticBuffer
from deepcomm.compat.events import EventHandle, EventOverlap
from deepcomm.compat.handles import EPHandle
from deepcomm.compat.install import deep_ep_path, install_as_deep_ep

topk_idx_t = torch.int64
"""Dtype of expert ids; deepcomm takes int32 as well."""

DEEP_EP_VERSION = f"2.1.0+deepcomm.{_deepcomm_version}"
"""Version of the interface, and of what answers to it."""

__all__ = [
    "DEEP_EP_VERSION",
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "deep_ep_path",
    "install_as_deep_ep",
    "topk_idx_t",
]
