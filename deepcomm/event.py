# SPDX-License-Identifier: Apache-2.0
"""Events: the completion of an operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CompletedEvent", "CudaEvent"]


class CompletedEvent:
    """Event of an operation that was complete when its call returned, as on CPUs."""

    def synchronize(self) -> None:
        """Return at once."""

    def current_stream_wait(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True."""
        return True


class CudaEvent:
    """Event of work on a stream of a GPU."""

    def __init__(
        self,
        event: torch.cuda.Event,
        device: torch.device,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Wrap a recorded event.

        Args:
            event: torch's.
            device: Whose current stream waits.
            check: Raises what the work has found to be wrong; called once it is complete.
        """
        self._event = event
        self._device = device
        self._check = check

    @classmethod
    def record(cls, device: torch.device, check: Callable[[], None] | None = None) -> CudaEvent:
        """Return the completion of all work so far of the device's current stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return cls(event, device, check)

    def synchronize(self) -> None:
        """Block the host until the work is complete; raise what it has found to be wrong."""
        self._event.synchronize()
        if self._check is not None:
            self._check()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the work."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def query(self) -> bool:
        """Return whether the work is complete, without blocking."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]
