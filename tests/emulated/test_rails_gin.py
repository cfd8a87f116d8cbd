# SPDX-License-Identifier: Apache-2.0
"""Carried rails once more, over NCCL's device API: ``GinNetwork`` and its agent on the emulator."""

from __future__ import annotations

import pytest
from emulated import test_rails
from emulated.operations import HIGH_THROUGHPUT_ONLY
from emulated.test_rails import (
    test_buffer_grows,
    test_carried_exchange_equals_reference,
    test_graph_is_refused_and_explain_and_sizes_know_the_network,
    test_late_rank_takes_no_rows_of_one_that_has_failed,
    test_ranks_that_differ_all_say_so,
    test_refusal_of_what_the_network_has_been_told,
    test_refused_dispatch_is_named_and_the_buffer_goes_on,
    test_slow_networks_change_nothing,
    test_sums_travel_in_parts,
    test_token_is_carried_once_per_node,
    test_what_stops_ends_the_operation_everywhere,
    test_worked_example_of_carried_rails,
)

from deepcomm.backends.cuda import gin

__all__ = [
    "test_buffer_grows",
    "test_carried_exchange_equals_reference",
    "test_graph_is_refused_and_explain_and_sizes_know_the_network",
    "test_late_rank_takes_no_rows_of_one_that_has_failed",
    "test_ranks_that_differ_all_say_so",
    "test_refusal_of_what_the_network_has_been_told",
    "test_refused_dispatch_is_named_and_the_buffer_goes_on",
    "test_slow_networks_change_nothing",
    "test_sums_travel_in_parts",
    "test_token_is_carried_once_per_node",
    "test_what_stops_ends_the_operation_everywhere",
    "test_worked_example_of_carried_rails",
]

pytestmark = pytest.mark.emulated_backend


@pytest.fixture(autouse=True)
def over_gin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_rails, "CARRIED", {**HIGH_THROUGHPUT_ONLY, "rail": "gin"})
    # Real seconds, in which no kernel of the emulator goes on.
    monkeypatch.setattr(gin, "GRACE_S", 0.05)
