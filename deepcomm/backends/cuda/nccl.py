# SPDX-License-Identifier: Apache-2.0
"""``NcclNetwork``: NCCL's sends and receives as a network; and which libnccl that would be."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from deepcomm._C import nccl
from deepcomm.backends.cuda.progress import watch
from deepcomm.errors import NcclError
from deepcomm.group import agree, check_equal, members_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deepcomm._C import cuda
    from deepcomm.backends.cuda.network import Message
    from deepcomm.errors import Error
    from deepcomm.group import Group

__all__ = [
    "Found",
    "NcclNetwork",
    "NcclOptions",
    "default_library",
    "find_wheel",
    "meet_nccl",
    "probe_nccl",
]

WHAT: Final = "NCCL"
LIBRARY: Final = "libnccl.so.2"

logger = logging.getLogger("deepcomm")


@dataclass(frozen=True, slots=True)
class Found:
    """The libnccl that ranks of this process would use.

    Attributes:
        path: Its file.
        version: Such as ``2.28.9``.
        was_loaded: Whether it had been loaded before: by torch, normally.
    """

    path: str
    version: str
    was_loaded: bool


def probe_nccl() -> Found | str:
    """Return the libnccl that would be used, or why there is none; looks, and asks no peer."""
    try:
        library = default_library()
    except NcclError as error:
        return str(error)
    return Found(library.path, library.version, library.was_loaded)


@functools.cache
def default_library() -> nccl.Library:
    """Return the libnccl that is loaded (torch's), else that of NVIDIA's wheel, else the loader's.

    Raises:
        NcclError: There is none, or it is too old.
    """
    return nccl.Library.find(find_wheel() or "")


def find_wheel() -> str | None:
    """Return the path of the libnccl in NVIDIA's wheel, None where that is not installed."""
    for wheel in importlib.metadata.distributions():
        if (wheel.metadata["Name"] or "").startswith("nvidia-nccl"):
            for file in wheel.files or ():
                if file.name == LIBRARY:
                    return str(file.locate())
    return None


@dataclass(frozen=True, slots=True)
class NcclOptions:
    """How a communicator is made.

    Attributes:
        timeout_s: Of the meeting, and of each move's launch.
        traffic_class: Of its packets; None is NCCL's choice.
        max_ctas: Blocks that it may occupy; None is NCCL's choice.
    """

    timeout_s: float
    traffic_class: int | None = None
    max_ctas: int | None = None


class NcclNetwork:
    """The ranks of a group, and NCCL between their devices."""

    def __init__(
        self,
        group: Group,
        device: cuda.Device,
        stream: Callable[[], int],
        options: NcclOptions,
        library: Callable[[], nccl.Library] = default_library,
        *,
        why: str = "",
    ) -> None:
        """Meet the other ranks; collective over ``group`` (and the whole, if that is a part).

        Args:
            group: The control plane; also gives ranks their numbers.
            device: This rank's.
            stream: Returns the driver's handle of the current stream.
            options: How the communicator is made.
            library: Finds the library; instead of this process's.
            why: Why it is this network, for ``explain()``.

        Raises:
            NcclError: There is no NCCL here, it is too old, or it failed.
            CommTimeout: The ranks did not meet in time.
            CommError: A peer failed; names it.
            ConfigMismatch: Ranks have different versions of NCCL.
        """
        self._ended = threading.Event()
        weakref.finalize(self, self._ended.set)
        self._stream = stream
        self._timeout_s = options.timeout_s
        self._why = f"; {why}" if why else ""
        found, self._native = meet_nccl(group, device, options, library)
        self._label = label_of(found, options)

    @property
    def name(self) -> str:
        """The ``rail`` of a buffer that this is."""
        return "nccl"

    def register(self, address: int, num_bytes: int) -> None:
        """Do nothing: NCCL sends any memory."""

    def deregister(self, address: int) -> None:
        """Do nothing."""

    def move(self, messages: Sequence[Message]) -> None:
        """Launch all sends and receives on the current stream, as one group."""
        sends = [
            (message.peer, span.address, span.num_bytes)
            for message in messages
            for span in message.sends
        ]
        receives = [
            (message.peer, span.address, span.num_bytes)
            for message in messages
            for span in message.receives
        ]
        self._native.move(self._stream(), sends, receives, self._timeout_s)

    def abort(self) -> None:
        """End moves under way; from any thread; idempotent."""
        self._native.abort()

    def fail_with(self, address: int) -> None:
        """Do nothing: a move ends early only where it is aborted, after the failure."""

    def watch(self, has_failed: Callable[[], bool], condemn: Callable[[Error], None]) -> None:
        """Abort once ``has_failed()``."""
        del condemn  # NCCL's kernels tell nothing
        watch(self.name, has_failed, self._native.abort, self._ended)

    def close(self) -> None:
        """Wait for this rank's moves and leave; idempotent."""
        self._ended.set()
        if trouble := self._native.close(self._timeout_s):
            logger.warning("a network was closed by force: %s", trouble)

    def describe(self) -> str:
        """Return NCCL's version and file, the class of what it sends, and why it was chosen."""
        return f"{self._label}{self._why}"


def label_of(library: nccl.Library, options: NcclOptions) -> str:
    """Return NCCL's version and file, and the class of what it sends."""
    asked = options.traffic_class
    in_class = "" if asked is None else f", traffic class {asked}"
    return f"NCCL {library.version}, {library.path}{in_class}"


def meet_nccl(
    group: Group,
    device: cuda.Device,
    options: NcclOptions,
    library: Callable[[], nccl.Library] = default_library,
) -> tuple[nccl.Library, nccl.Communicator]:
    """Return the library, of one version on all ranks, and their communicator; collective.

    Raises:
        Error: As the constructor of ``NcclNetwork`` does.
    """
    found, unique_id = _agree_on_id(group, library)
    name = f"rank {members_of(group)[group.rank]}"
    config = nccl.CommunicatorConfig(name, group.rank, group.size, unique_id)
    if options.traffic_class is not None:
        config.traffic_class = options.traffic_class
    if options.max_ctas is not None:
        config.max_ctas = options.max_ctas
    return found, _meet(group, lambda: nccl.Communicator(device, found, config, options.timeout_s))


def _agree_on_id(group: Group, find: Callable[[], nccl.Library]) -> tuple[nccl.Library, bytes]:
    """Return the library, of one version on all ranks, and what rank 0 names the communicator."""
    found: list[nccl.Library] = []

    def version() -> str:
        found.append(find())
        return found[0].version

    def make_id() -> bytes:
        # Inside what is agreed on: a part of a group must not fail without the rest.
        check_equal(WHAT, [{"version": entry} for entry in versions], members_of(group))
        return found[0].make_unique_id() if group.rank == 0 else b""

    versions = agree(group, WHAT, version)
    return found[0], agree(group, WHAT, make_id)[0]


def _meet(group: Group, make: Callable[[], nccl.Communicator]) -> nccl.Communicator:
    made: list[nccl.Communicator] = []
    try:
        agree(group, WHAT, lambda: made.append(make()))
    except BaseException:
        for communicator in made:
            communicator.abort()
        raise
    return made[0]
