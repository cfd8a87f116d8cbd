# SPDX-License-Identifier: Apache-2.0
"""Places of the compatibility tests, and clean class attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compat.places import PLACES, PLACES_KEY

from deepcomm.compat import Buffer

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", metafunc.config.stash.get(PLACES_KEY, PLACES))


@pytest.fixture(autouse=True)
def _num_sms_is_restored() -> Iterator[None]:
    before = Buffer.num_sms
    yield
    Buffer.num_sms = before
