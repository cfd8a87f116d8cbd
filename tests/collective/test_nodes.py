# SPDX-License-Identifier: Apache-2.0
"""The matrix over several nodes on the CPU backend; that of the CUDA backend is in emulated."""

from __future__ import annotations

import pytest
from collective.case import Case, case_params
from collective.nodes import LOW_LATENCY_CASES, LOW_LATENCY_SLOW_CASES, NODES_CASES
from collective.scenario import exchange, low_latency_exchange
from collective.session import Oracle

from deepcomm.testing import LocalCluster


@pytest.mark.slow  # test_matrix.py has much of it
@pytest.mark.parametrize(**case_params(NODES_CASES))
def test_exchange_over_nodes_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: exchange(group, case, oracle))


@pytest.mark.parametrize(**case_params(LOW_LATENCY_CASES))
def test_low_latency_over_nodes_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: low_latency_exchange(group, case, oracle))


@pytest.mark.slow
@pytest.mark.parametrize(**case_params(LOW_LATENCY_SLOW_CASES))
def test_all_of_low_latency_over_nodes_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: low_latency_exchange(group, case, oracle))
