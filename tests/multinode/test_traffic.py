# SPDX-License-Identifier: Apache-2.0
"""A token crosses the network once per destination node: seen at the interfaces of the nodes."""

from __future__ import annotations

from typing import Any

import pytest
from multinode import netns, ranks
from multinode.ranks import NUM_TOKENS, ROW_BYTES, Traffic

pytestmark = pytest.mark.multi_node

SHAPES = [(2, 2), (3, 2), (2, 3)]
OPERATIONS = ["dispatch", "combine", "low_latency_dispatch", "low_latency_combine"]
HEADERS = 1.1  # of TCP, and ids and weights of the rows
CONTROL_BYTES = 100_000  # barriers of the test, announcements
SLOW_RATE, SLOW_BYTES_PER_S = "80mbit", 10e6


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), SHAPES)
def test_token_crosses_once_per_node(num_nodes: int, ranks_per_node: int) -> None:
    with netns.nodes_of(num_nodes) as nodes:
        traffic = netns.run_on_nodes(nodes, ranks_per_node, ranks.measure_traffic)
    for operation in OPERATIONS:
        for first in range(0, len(traffic), ranks_per_node):
            of_node = [entry[operation] for entry in traffic[first : first + ranks_per_node]]
            check_node(of_node, num_nodes)


def check_node(traffic: list[Traffic], num_nodes: int) -> None:
    """Each rank's tokens have an expert on every rank of every other node."""
    payload = NUM_TOKENS * ROW_BYTES * (num_nodes - 1)
    for rank in traffic:
        assert payload <= rank.stats_bytes <= HEADERS * payload
    counted = sum(rank.stats_bytes for rank in traffic)
    once_per_rank = payload * len(traffic) * len(traffic)
    for moved in (max(t.sent_bytes for t in traffic), max(t.received_bytes for t in traffic)):
        assert counted <= moved <= HEADERS * counted + CONTROL_BYTES
        assert moved < 0.8 * once_per_rank


def test_slow_link_is_the_bound() -> None:
    with netns.nodes_of(2) as nodes:
        for node in nodes:
            node.limit_rate(SLOW_RATE)
        traffic = netns.run_on_nodes(nodes, 2, ranks.measure_traffic)
    for operation in OPERATIONS:
        slowest = max(entry[operation].seconds for entry in traffic)
        wire_s = 2 * NUM_TOKENS * ROW_BYTES / SLOW_BYTES_PER_S
        assert wire_s * 0.8 <= slowest <= wire_s * 3 + 1


def test_bytes_follow_the_number_of_distinct_nodes(load_benchmark: Any) -> None:
    benchmark = load_benchmark("once_per_node")
    # Slow enough, and often enough, that what is sent again after a burst does not count.
    setting = benchmark.Setting(2, 2, 128, 2048, 16, 4, "uniform", samples=3)
    figures = benchmark.measure(setting, "200mbit")
    sent = {(f.operation, f.once_per): f for f in figures}
    for operation in ("dispatch", "combine"):
        node, rank = sent[operation, "node"], sent[operation, "rank"]
        assert rank.rows > 1.3 * node.rows
        assert rank.sent_bytes / node.sent_bytes == pytest.approx(rank.rows / node.rows, rel=0.1)
