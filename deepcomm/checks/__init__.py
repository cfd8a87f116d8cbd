# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the operations, in one place for all backends.

They are in Python because they are about tensors; what is inside ``topk_idx`` (range, repetition)
is checked where the ids are read. Every message states the argument, what was expected and what
came.
"""

from deepcomm.checks.combine import CheckedCombine, check_combine
from deepcomm.checks.common import check_length
from deepcomm.checks.dispatch import CheckedDispatch, check_dispatch, check_out_shape
from deepcomm.checks.mask import check_peer, check_taken_back

__all__ = [
    "CheckedCombine",
    "CheckedDispatch",
    "check_combine",
    "check_dispatch",
    "check_length",
    "check_out_shape",
    "check_peer",
    "check_taken_back",
]
