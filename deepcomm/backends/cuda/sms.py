# SPDX-License-Identifier: Apache-2.0
"""How many SMs the operations of a buffer take: what fills the links, and what has room.

Kernels of all ranks wait for each other, so all their blocks must be resident. Ranks that share a
device share its SMs; a block takes one at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from deepcomm.errors import InvalidArgument
from deepcomm.group import agree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepcomm.backends.cuda.runtime import Runtime
    from deepcomm.group import Group

__all__ = ["DEFAULT_NUM_SMS", "SmShare", "share_sms"]

DEFAULT_NUM_SMS: Final = 24


@dataclass(frozen=True, slots=True)
class SmShare:
    """What one rank's kernels may count on.

    Attributes:
        high_throughput: SMs of a dispatch or combine: as asked, or enough for the links.
        low_latency: SMs of a low-latency operation: as asked, or what there is.
        num_sharing: Ranks of the buffer on the device, this one included.
    """

    high_throughput: int
    low_latency: int
    num_sharing: int


def share_sms(group: Group, runtime: Runtime, asked: int | None) -> SmShare:
    """Divide the SMs of each device among the ranks on it; collective.

    Args:
        group: Of the buffer.
        runtime: This rank's device.
        asked: This rank's ``num_sms``; ranks may choose differently.

    Raises:
        InvalidArgument: What the ranks on this device ask for does not fit together.
        CommError: Likewise on another device; names a rank of it.
    """
    entries = group.all_gather((runtime.device_id, asked))
    sharing = [wish for device, wish in entries if device == runtime.device_id]
    agree(group, "Buffer", lambda: check_room(runtime.num_sms, sharing))
    fixed = [wish for wish in sharing if wish is not None]
    if asked is not None:
        return SmShare(asked, asked, len(sharing))
    most = (runtime.num_sms - sum(fixed)) // (len(sharing) - len(fixed))
    return SmShare(min(DEFAULT_NUM_SMS, most), most, len(sharing))


def check_room(num_sms: int, sharing: Sequence[int | None]) -> None:
    """Raise InvalidArgument unless the blocks of all ranks on a device are resident together."""
    wanted = sum(1 if wish is None else wish for wish in sharing)
    if wanted <= num_sms:
        return
    got = " + ".join(map(str, sharing))
    ranks = "1 rank" if len(sharing) == 1 else f"{len(sharing)} ranks"
    raise InvalidArgument(
        f"num_sms: expected at most {num_sms} SMs for {ranks} on the device together, got {got}"
    )
