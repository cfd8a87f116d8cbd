# SPDX-License-Identifier: Apache-2.0
"""The catalogue of memory-model shapes: forbidden outcomes never, allowed ones do occur."""

from __future__ import annotations

import pytest
from emulated.conftest import Builder

FORBIDDEN = (
    "mp_release_acquire",
    "mp_fences",
    "mp_gpu_release_acquire",
    "mp_gpu_fences",
    "isa2_gpu_then_sys",
    "release_sequence_rmw",
    "release_sequence_own_rmw",
    "sb_fence_sc",
    "wrc",
    "isa2",
    "iriw_fence_sc",
    "coherence_read_read",
    "coherence_write_read",
    "rmw_atomicity",
)
ALLOWED = (
    "mp_relaxed",
    "mp_fence_too_narrow",
    "mp_block_fence_across_blocks",
    "release_sequence_broken_by_store",
    "sb_relaxed",
    "sb_fence_acq_rel",
    "sb_fence_sc_gpu_across_ranks",
    "isa2_relaxed_middle",
    "iriw_acquire",
    "iriw_fence_acq_rel",
)
# Allowed by PTX and never produced: a thread's operations take effect in program order, so a load
# cannot see a store that follows it in another thread's order, nor can two stores swap.
KNOWN_INCOMPLETE = ("lb_relaxed", "2+2w_relaxed")


def test_shapes_list_is_complete(program: Builder) -> None:
    assert sorted(program("shapes").cases()) == sorted(FORBIDDEN + ALLOWED + KNOWN_INCOMPLETE)


@pytest.mark.parametrize("case", FORBIDDEN)
def test_shape_forbidden_outcome_never_occurs(program: Builder, num_seeds: int, case: str) -> None:
    result = program("shapes").run(case, range(num_seeds))
    assert result.failures == 0, result.explain()
    assert not result.notes


@pytest.mark.parametrize("case", ALLOWED)
def test_shape_allowed_outcome_occurs_without_alarm(
    program: Builder, num_seeds: int, case: str
) -> None:
    result = program("shapes").run(case, range(num_seeds))
    assert result.failures == 0, result.explain()
    assert result.notes.get("weak outcome", 0) > 0


@pytest.mark.parametrize("case", KNOWN_INCOMPLETE)
def test_shape_known_incompleteness(program: Builder, num_seeds: int, case: str) -> None:
    result = program("shapes").run(case, range(num_seeds))
    assert result.failures == 0, result.explain()
    assert not result.notes, "the emulator has learnt this: move it to ALLOWED"
