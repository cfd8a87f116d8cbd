# SPDX-License-Identifier: Apache-2.0
"""Exceptions of deepcomm, one class for each class of ``csrc/common/error.hpp``.

``InvalidArgument`` and ``ConfigMismatch`` leave a ``Buffer`` usable. So does a ``CommError`` that
reports a peer's argument error. After ``CommTimeout``, or a ``CommError`` that reports a lost peer,
every operation raises ``CommError`` naming what happened: the buffer can only be closed.
"""

from __future__ import annotations

__all__ = [
    "CommError",
    "CommTimeout",
    "ConfigMismatch",
    "CudaError",
    "Error",
    "InternalError",
    "InvalidArgument",
    "NcclError",
]


class Error(RuntimeError):
    """Base of every exception that deepcomm raises on purpose."""


class InvalidArgument(Error, ValueError):
    """An argument is wrong; the message states the argument, what was expected and what came."""


class ConfigMismatch(Error):
    """Ranks disagree on something that must be equal; the message names field and values."""


class CommError(Error):
    """A peer failed or refused; the message names the rank, the peer and the operation.

    Attributes:
        peer: Rank of the peer at fault in the buffer's group, or None where no single one is.
    """

    def __init__(self, message: str, peer: int | None = None) -> None:
        """Store the message and the peer at fault."""
        super().__init__(message)
        self.peer = peer


class CommTimeout(CommError):
    """A peer did not arrive before the deadline; the buffer can only be closed."""


def describe_error(error: BaseException) -> str:
    """Return what peers are told of an error: its text, and its kind where it is not ours."""
    return str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"


class CudaError(Error):
    """A CUDA driver call failed; the message holds the call, the code and its name."""


class NcclError(Error):
    """An NCCL call failed; the message holds the call, the code and its name."""


class InternalError(Error):
    """An invariant of deepcomm itself is broken: a bug worth reporting."""
