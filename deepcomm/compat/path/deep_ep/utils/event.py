# SPDX-License-Identifier: Apache-2.0
"""Another way to the events."""

from deepcomm.compat import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
