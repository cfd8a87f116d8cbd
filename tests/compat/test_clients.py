# SPDX-License-Identifier: Apache-2.0
"""Real clients, installed from PyPI (extra ``compat-test``), against a dense reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compat import clients, sglang_client
from compat.dense import Problem

from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable

BF16 = {"dtype": torch.bfloat16}
ON_GPUS = {**BF16, "hidden": 256}  # as the other tests, whose kernels are compiled
# torch.compile is the clients' way to fuse small operations; it is not what is tested here.
ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}


@pytest.mark.parametrize(
    ("device", "num_ranks"),
    [
        pytest.param("cpu", 2),
        pytest.param("cpu", 4),
        pytest.param("cuda", 2, marks=pytest.mark.gpu(2)),
    ],
)
@pytest.mark.parametrize(
    ("client", "options"),
    [
        pytest.param(
            clients.megatron, {}, id="megatron-core", marks=pytest.mark.clients("megatron")
        ),
        pytest.param(
            clients.automodel, {}, id="nemo-automodel", marks=pytest.mark.clients("nemo_automodel")
        ),
        pytest.param(
            clients.torchtitan,
            {"even": True},
            id="torchtitan",
            marks=pytest.mark.clients("torchtitan", "spmd_types", "tyro"),
        ),
        pytest.param(
            clients.deepspeed, BF16, id="deepspeed", marks=pytest.mark.clients("deepspeed")
        ),
        pytest.param(sglang_client.sglang, BF16, id="sglang", marks=pytest.mark.clients("sglang")),
    ],
)
def test_client_equals_dense_layer(
    client: Callable[..., None], options: dict[str, Any], device: str, num_ranks: int
) -> None:
    if device == "cuda":
        options = {**options, **ON_GPUS}
    problem = Problem(num_ranks, device=device, **options)
    environment = [ENVIRONMENT] * num_ranks
    run_processes(client, num_ranks, problem, env=environment, timeout_s=200)
