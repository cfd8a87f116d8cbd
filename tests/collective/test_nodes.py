# SPDX-License-Identifier: Apache-2.0
"""The matrix over several nodes on the CPU backend; that of the CUDA backend is in emulated."""

from __future__ import annotations

import pytest
from collective.case import Case, case_params
from collective.nodes import NODES_CASES
from collective.scenario import exchange
from collective.session import Oracle

from deepcomm.testing import LocalCluster


@pytest.mark.slow  # test_matrix.py has much of it
@pytest.mark.parametrize(**case_params(NODES_CASES))
def test_exchange_over_nodes_equals_reference(case: Case) -> None:
    oracle = Oracle()
    LocalCluster(case.num_ranks).run(lambda group: exchange(group, case, oracle))
