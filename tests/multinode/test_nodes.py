# SPDX-License-Identifier: Apache-2.0
"""Nodes with addresses of their own: found by themselves, results those of the reference."""

from __future__ import annotations

import pytest
from collective.case import WIRES, Case
from collective.workers import exchange_all
from multinode import netns, ranks

from deepcomm import RecvLayout

pytestmark = pytest.mark.multi_node

SHAPES = [(2, 2), pytest.param(3, 2, marks=pytest.mark.slow), (2, 1)]


def cases(num_nodes: int, ranks_per_node: int) -> list[Case]:
    """Return every layout, each with some of the wires, so that all wires are there."""
    layouts = list(RecvLayout)
    return [
        Case(
            num_ranks=num_nodes * ranks_per_node,
            ranks_per_node=ranks_per_node,
            num_tokens=12,
            num_topk=3,
            experts_per_rank=3,
            layout=layouts[index % len(layouts)],
            wire=wire,
            routing="uniform" if index % 2 else "sparse",
            alignment=4 if layouts[index % len(layouts)] is RecvLayout.EXPERT else 1,
        )
        for index, wire in enumerate(WIRES)
    ]


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), SHAPES)
def test_nodes_are_found_by_their_shared_memory(num_nodes: int, ranks_per_node: int) -> None:
    with netns.nodes_of(num_nodes) as nodes:
        found = netns.run_on_nodes(nodes, ranks_per_node, ranks.describe)
        assert not any(node.leftovers() for node in nodes)
    for num_ranks, per_node, text in found:
        assert (num_ranks, per_node) == (num_nodes * ranks_per_node, ranks_per_node)
        assert netns.INTERFACE in text


@pytest.mark.parametrize(("num_nodes", "ranks_per_node"), SHAPES)
def test_nodes_equal_reference(num_nodes: int, ranks_per_node: int) -> None:
    with netns.nodes_of(num_nodes) as nodes:
        all_cases = cases(num_nodes, ranks_per_node)
        netns.run_on_nodes(nodes, ranks_per_node, exchange_all, all_cases, timeout_s=120)
        assert not any(node.leftovers() for node in nodes)


def test_slow_link_changes_nothing() -> None:
    case = Case(
        num_ranks=4, ranks_per_node=2, num_tokens=48, hidden=512, num_topk=4, experts_per_rank=2
    )
    with netns.nodes_of(2) as nodes:
        nodes[0].limit_rate("20mbit")
        netns.run_on_nodes(nodes, 2, exchange_all, [case], timeout_s=120)
