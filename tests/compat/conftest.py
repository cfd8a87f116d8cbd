# SPDX-License-Identifier: Apache-2.0
"""Places of the compatibility tests, clean class attributes, waits that end in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compat.places import PLACES, PLACES_KEY

from deepcomm.compat import Buffer, native
from deepcomm.config import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

WAIT_S = 60.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", metafunc.config.stash.get(PLACES_KEY, PLACES))


@pytest.fixture(autouse=True)
def _num_sms_is_restored() -> Iterator[None]:
    before = Buffer.num_sms
    yield
    Buffer.num_sms = before


@pytest.fixture(autouse=True)
def _waits_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test that hangs fail before its process is ended, which would hide the others."""
    original = native.Buffer

    def open_buffer(*args: Any, timeout_s: float, **options: Any) -> Any:
        limit = WAIT_S if timeout_s == DEFAULT_TIMEOUT_S else timeout_s
        return original(*args, timeout_s=limit, **options)

    monkeypatch.setattr(native, "Buffer", open_buffer)
