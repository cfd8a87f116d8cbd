# SPDX-License-Identifier: Apache-2.0
"""Native results become tensors by torch's C functions for DLPack, and the same without them."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

# Both ranks' results of both modes, every tensor as dtype, shape, strides and elements.
PROGRAM = """
import dataclasses, sys
import torch
if sys.argv[1] == "without" and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
from deepcomm import Buffer, RecvLayout
from deepcomm.testing import LocalCluster

def tensors_of(record):
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor):
            elements = value.contiguous().view(-1).view(torch.uint8).tolist()
            yield field.name, str(value.dtype), tuple(value.shape), value.stride(), elements

def rank_main(group):
    topk_idx = torch.tensor([[0, 2], [3, -1], [1, 0]])[: 3 - group.rank]
    x, weights = torch.ones(len(topk_idx), 128), torch.full((len(topk_idx), 2), 0.5)
    sizes = dict(num_experts=4, num_topk=2, hidden=128, max_tokens_per_rank=4)
    options = dict(zero_padding=True, quantize="fp8_e4m3")
    with Buffer(group, device="cpu", **sizes) as buffer:
        results = [buffer.dispatch(x, topk_idx, weights, recv_layout=layout, **options)
                   for layout in RecvLayout]
        results.append(buffer.dispatch(x, topk_idx.int()))
        results.append(buffer.low_latency_dispatch(x, topk_idx, weights, **options))
        handles = [result.handle for result in results]
        # Scales of rows that hold no token are padding.
        return [list(tensors_of(dataclasses.replace(it, scales=None))) for it in results] + [
            list(tensors_of(handle)) for handle in handles
        ]

print(LocalCluster(2).run(rank_main))
"""


def run(mode: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def results() -> str:
    return run("with")


def test_results_are_the_same_without_the_c_functions(results: str) -> None:
    assert run("without") == results


def test_results_have_the_documented_types(results: str) -> None:
    (first, *_), _ = ast.literal_eval(results)  # of rank 0: TOKEN rows
    types = {name: (dtype, shape) for name, dtype, shape, *_ in first}
    assert types == {
        "x": ("torch.float8_e4m3fn", (3, 128)),
        "topk_idx": ("torch.int64", (3, 2)),
        "topk_weights": ("torch.float32", (3, 2)),
        "num_tokens_per_expert": ("torch.int32", (2,)),
        "num_recv_tokens": ("torch.int32", ()),
        "overflow": ("torch.bool", ()),
    }
