# SPDX-License-Identifier: Apache-2.0
"""Files by key, built once however many processes ask for them at the same time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DiskCache"]

logger = logging.getLogger("deepcomm")

MAGIC: Final = b"deepcomm cache 1\n"
SUFFIX: Final = ".bin"
LOCK_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class DiskCache:
    """A folder of files, each a checksum and what it protects.

    A file appears whole (written aside, then renamed), and a damaged one counts as absent. A lock
    a key lets one process build while the others wait. Where the folder cannot be written or
    locked, or a lock is held for longer than ``lock_timeout_s``, everybody builds for itself: the
    cache saves time, nothing depends on it.

    Attributes:
        folder: Made when something is stored.
        lock_timeout_s: Seconds to wait for another process that builds the same key.
    """

    folder: Path
    lock_timeout_s: float = 120.0

    def load(self, key: str) -> bytes | None:
        """Return what is stored under a key, None where there is nothing or it is damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        start = len(MAGIC) + hashlib.sha256().digest_size
        payload = content[start:]
        if content[:start] == MAGIC + hashlib.sha256(payload).digest():
            return payload
        logger.warning("%s is damaged and will be built again", path)
        return None

    def get_or_build(self, key: str, build: Callable[[], bytes]) -> tuple[bytes, bool]:
        """Return what is stored under a key, building and storing it first if need be.

        Args:
            key: A file name without suffix.
            build: Called by one process at a time; what it raises passes through, and nothing is
                stored.

        Returns:
            The content, and whether this call has built it.
        """
        if (payload := self.load(key)) is not None:
            return payload, False
        with self._locked(key):
            if (payload := self.load(key)) is not None:
                return payload, False
            payload = build()
            self._store(key, payload)
            return payload, True

    def sizes(self) -> list[int]:
        """Return the size in bytes of each file in the cache."""
        return [path.stat().st_size for path in self.folder.glob(f"*{SUFFIX}")]

    def _path(self, key: str) -> Path:
        return self.folder / (key + SUFFIX)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the key's lock while the block runs; go without where it cannot be had."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # NOTE: lock files stay: to remove one would let two processes lock two files.
            lock = os.open(self.folder / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            logger.warning("cache %s cannot be used: %s", self.folder, error)
            yield
            return
        try:
            self._wait_for(lock, key)
            yield
        finally:
            # A child forked meanwhile shares the descriptor: closing alone would not unlock.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _wait_for(self, lock: int, key: str) -> None:
        deadline = time.monotonic() + self.lock_timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    logger.warning("%s: locked for over %g s; built here", key, self.lock_timeout_s)
                    return
                time.sleep(LOCK_POLL_S)
            except OSError as error:
                logger.warning("cache %s cannot be locked: %s", self.folder, error)
                return
            else:
                return

    def _store(self, key: str, payload: bytes) -> None:
        temporary: Path | None = None
        try:
            handle, name = tempfile.mkstemp(prefix=f"{key}.", suffix=".tmp", dir=self.folder)
            temporary = Path(name)
            with open(handle, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(MAGIC + hashlib.sha256(payload).digest() + payload)
            temporary.chmod(0o644)  # a shared cache is read by others than its writer
            temporary.replace(self._path(key))
        except OSError as error:
            logger.warning("cache %s cannot be written: %s", self.folder, error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)
