# SPDX-License-Identifier: Apache-2.0
"""Steps that a network does not end."""

from __future__ import annotations

import ctypes

from deepcomm.backends.cuda.progress import PROGRESS_BYTES, Progress


class Words:
    """Two words of host memory."""

    def __init__(self) -> None:
        self.values = (ctypes.c_uint32 * 2)()
        self.address = self.device_address = ctypes.addressof(self.values)
        self.num_bytes = PROGRESS_BYTES

    def set(self, num_gates: int, num_deliveries: int) -> None:
        self.values[:] = (num_gates, num_deliveries)


def test_step_on_its_way_for_too_long_is_stuck() -> None:
    words, now = Words(), [0.0]
    progress = Progress(words, 10.0, lambda: now[0])
    for num_gates, num_deliveries, at, is_stuck in (
        (0, 0, 100.0, False),  # nothing to carry
        (1, 0, 200.0, False),  # its gate was passed just now
        (1, 0, 209.0, False),
        (1, 0, 211.0, True),
        (1, 1, 212.0, False),  # through after all
        (2, 1, 213.0, False),
        (3, 2, 222.0, False),  # each step has the limit for itself
        (3, 2, 231.0, False),
        (3, 2, 233.0, True),
    ):
        words.set(num_gates, num_deliveries)
        now[0] = at
        assert progress.is_stuck() == is_stuck, (num_gates, num_deliveries, at)
