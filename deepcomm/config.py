# SPDX-License-Identifier: Apache-2.0
"""What a user asks of a buffer: the frozen configuration that ranks compare at construction."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from deepcomm.errors import InvalidArgument

__all__ = ["DEFAULT_LATE_WARNING_S", "DEFAULT_TIMEOUT_S", "MAX_TOPK", "BufferConfig"]

DEFAULT_TIMEOUT_S = 300.0
"""Seconds a wait for a peer may take: above any skew from compiling or autotuning."""

DEFAULT_LATE_WARNING_S = 10.0
"""Seconds of waiting after which a late peer is logged."""

MAX_TOPK = 32
ROW_ALIGN_BYTES = 16
SMALLEST_ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class BufferConfig:
    """Arguments of ``Buffer``; its docstring explains each."""

    num_experts: int
    num_topk: int
    hidden: int
    max_tokens_per_rank: int
    ranks_per_node: int | None = None
    growable: bool = False
    num_sms: int | None = None
    num_threads: int | None = None
    num_generations: int = 3
    num_low_latency_slots: int = 4
    timeout_s: float = DEFAULT_TIMEOUT_S
    late_warning_s: float = DEFAULT_LATE_WARNING_S
    rail: str = "auto"
    traffic_class: int | None = None

    @property
    def is_carried(self) -> bool:
        """Whether a network carries what goes to other nodes, from mirrors of their memory."""
        return self.rail in ("gin", "nccl")

    def shared_fields(self) -> dict[str, Any]:
        """Return the fields that must be equal on all ranks."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LOCAL_FIELDS}

    def check(self, num_ranks: int) -> None:
        """Raise InvalidArgument for the first field that does not suit ``num_ranks`` ranks."""
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidArgument(f"{name}: expected an int, got {value!r}")
            if not low <= value <= high:
                raise InvalidArgument(f"{name}: expected {low}..{high}, got {value}")
        self._check_together(num_ranks)

    def _check_together(self, num_ranks: int) -> None:
        """Raise InvalidArgument for fields that are good alone but not together."""
        if self.num_experts % num_ranks:
            raise InvalidArgument(
                f"num_experts: expected a multiple of the group's {num_ranks} ranks, "
                f"got {self.num_experts}"
            )
        if self.num_topk > self.num_experts:
            raise InvalidArgument(
                f"num_topk: expected at most num_experts = {self.num_experts}, got {self.num_topk}"
            )
        if self.num_experts * self.max_tokens_per_rank > _INT32_MAX:
            raise InvalidArgument(
                "max_tokens_per_rank: expected num_experts * max_tokens_per_rank < 2^31, got "
                f"{self.num_experts} * {self.max_tokens_per_rank}"
            )
        if self.hidden * SMALLEST_ITEM_BYTES % ROW_ALIGN_BYTES:
            raise InvalidArgument(
                f"hidden: expected rows of a multiple of {ROW_ALIGN_BYTES} bytes "
                f"(hidden % 8 == 0), got {self.hidden}"
            )
        if self.num_low_latency_slots in (1, 2):
            raise InvalidArgument(
                f"num_low_latency_slots: expected 0 or at least 3, got {self.num_low_latency_slots}"
            )
        if self.ranks_per_node is not None and num_ranks % self.ranks_per_node:
            raise InvalidArgument(
                f"ranks_per_node: expected a divisor of the group's {num_ranks} ranks, "
                f"got {self.ranks_per_node}"
            )
        for name in ("timeout_s", "late_warning_s"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(
                    f"{name}: expected a positive number of seconds, got {getattr(self, name)}"
                )


LOCAL_FIELDS = frozenset({"num_sms", "num_threads", "timeout_s", "late_warning_s"})
_OPTIONAL = frozenset({"ranks_per_node", "num_sms", "num_threads", "traffic_class"})
_INT32_MAX = 2**31 - 1
_RANGES = (
    ("num_experts", 1, _INT32_MAX),
    ("num_topk", 1, MAX_TOPK),
    ("hidden", 1, 2**24),
    ("max_tokens_per_rank", 1, 2**24),
    ("ranks_per_node", 1, _INT32_MAX),
    ("num_sms", 1, 4096),
    ("num_threads", 1, 1024),
    ("num_generations", 2, 64),
    ("num_low_latency_slots", 0, 64),
    ("traffic_class", 0, _INT32_MAX),
)
