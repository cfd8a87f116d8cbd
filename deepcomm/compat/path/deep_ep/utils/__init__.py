# SPDX-License-Identifier: Apache-2.0
"""Another way to the events."""

from deepcomm.compat import EventHandle, EventOverlap

from . import event

__all__ = ["EventHandle", "EventOverlap", "event"]
