# SPDX-License-Identifier: Apache-2.0
"""Devices of the compatibility tests, and clean class attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compat.play import DEVICES

from deepcomm.compat import Buffer

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _num_sms_is_restored() -> Iterator[None]:
    before = Buffer.num_sms
    yield
    Buffer.num_sms = before
