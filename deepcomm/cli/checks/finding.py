# SPDX-License-Identifier: Apache-2.0
"""What a check of ``deepcomm doctor`` reports."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Finding", "Status"]


class Status(str, enum.Enum):
    """How good a finding is."""

    OK = "OK"
    INFO = "INFO"
    """Absent, and not needed on this machine."""
    WARN = "WARN"
    """Works, or is not needed, but may disappoint."""
    FAIL = "FAIL"
    """Broken, and needed on this machine."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        section: Part of the machine.
        name: What was looked at.
        status: How good it is.
        detail: What was found.
        remedy: What to do about it, or None.
    """

    section: str
    name: str
    status: Status
    detail: str
    remedy: str | None = None
