# SPDX-License-Identifier: Apache-2.0
"""Correct uses of each primitive pass; each wrong use is reported by name."""

from __future__ import annotations

import pytest
from emulated.conftest import Builder

PRIMITIVES = (
    "epoch",
    "record",
    "check",
    "warp",
    "named_barrier",
    "bytes",
    "kernel_boundary",
    "padding",
    "proxy_fence_by_writer",
    "proxy_fence_by_reader",
    "mbarrier_late",
    "rail",
)
PRIMITIVE_SEEDS = 1_000
MISUSE_SEEDS = 100

# What the first report of each misuse says.
MISUSES = {
    "race_write": "race: write of r0:zeros+0x0",
    "race_read": "race:",
    "race_byte": "race: write of r0:zeros+0x0",
    "race_struct": "r0:zeros+0x2c",
    "race_block_scope_across_blocks": "a scope is too narrow",
    "race_ballot_orders_nothing": "race: read of r0:zeros+0x0 by r0.b0.t1",
    "race_plain_poll": "race:",
    "race_narrow_scope": "a scope is too narrow",
    "behind_the_end": "out of bounds: write of r0:zeros+0x40 (behind its end)",
    "behind_shared_memory": "out of bounds: write of r0:b0.shared",
    "shared_memory_too_small": "shared storage of 384 bytes is asked, 256 are launched",
    "undefined_global": "uninitialised: r0:poison+0xc",
    "undefined_shared": "uninitialised: r0:b0.shared+0xc",
    "another_threads_local": "r0.b0.t1 touches a local variable of another thread",
    "mixed_sizes": "mixed sizes: r0:wide+0x0 is accessed strongly as 8 bytes",
    "misaligned": "misaligned",
    "mask_mismatch": "r0.b0.t3 is in ballot(mask 0000ffff) while lanes",
    "mask_without_own_lane": "which leaves out its own lane",
    "divergent_collectives": "wait for it in",
    "barrier_counts_differ": "others wait there for",
    "deadlock_named_barrier": "r0.b0.t0 waits for named barrier (and 31 more alike)",
    "deadlock_crossed_waits": "r1.b0.t0 waits for word r0:zeros+0x",
    "livelock_raw_spin": "livelock: 401000 steps of loads only",
    "bulk_size": "sizes and addresses are multiples of 16",
    "bulk_bounds": "out of bounds: bulk copy of 128 bytes at r0:zeros+0x0",
    "bulk_load_not_awaited": "r0:b0.shared+0x14",
    "bulk_expected_before_issued": "issues copies before the arrival that expects them",
    "bulk_exit_before_read": "ends while 1 of its bulk copies still read shared memory",
    "bulk_source_reused": "race: asynchronous read of r0:b0.shared+0x0",
    "bulk_flag_polled": "race: write of r0:zeros+0x3c by a copy of r0.b0.t0",
    "bulk_load_without_proxy_fence": "(no proxy fence between them)",
    "mbarrier_as_data": "is accessed as data",
    "rail_signal_by_another_warp": "race: rail signal of r0.b0.t32 is unordered with a put of",
    "rail_signal_on_another_context": "r0:poison+0x0",
    "rail_source_reused_without_flush": "race: asynchronous read of r0:zeros+0x0",
    "rail_put_not_awaited": "r0:poison+0x0",
}
# Seen only where the copy has not yet run: the others are reported whatever the schedule.
SCHEDULE_DEPENDENT = {"bulk_exit_before_read"}
SLOW = {"livelock_raw_spin"}  # runs into its limit of steps


def test_primitive_lists_are_complete(program: Builder) -> None:
    assert tuple(program("primitives").cases()) == PRIMITIVES
    assert program("misuse").cases() == list(MISUSES)


@pytest.mark.parametrize("case", PRIMITIVES)
def test_primitive_passes_every_seed(program: Builder, num_seeds: int, case: str) -> None:
    seeds = range(min(num_seeds, PRIMITIVE_SEEDS))
    result = program("primitives").run(case, seeds)
    assert result.failures == 0, result.explain()


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_reported(program: Builder, case: str) -> None:
    seeds = range(3 if case in SLOW else MISUSE_SEEDS)
    result = program("misuse").run(case, seeds)
    assert MISUSES[case] in result.error
    if case in SCHEDULE_DEPENDENT:
        assert 0 < result.failures < len(seeds)
    else:
        assert result.failures == len(seeds)
