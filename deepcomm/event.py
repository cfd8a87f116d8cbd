# SPDX-License-Identifier: Apache-2.0
"""Events: the completion of an operation."""

from __future__ import annotations

__all__ = ["CompletedEvent"]


class CompletedEvent:
    """Event of an operation that was complete when its call returned, as on CPUs."""

    def synchronize(self) -> None:
        """Return at once."""

    def current_stream_wait(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True."""
        return True
