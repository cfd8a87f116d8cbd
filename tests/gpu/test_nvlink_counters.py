# SPDX-License-Identifier: Apache-2.0
"""The counters of ``Buffer.stats`` beside those of the GPUs' links, between two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu.backend_ranks import in_process, meet

from deepcomm import Buffer, RecvLayout
from deepcomm.testing import run_processes

pytestmark = pytest.mark.gpu(2)

NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 4096, 7168, 64, 8
NUM_DISPATCHES = 100
ALL_LINKS = 0xFFFFFFFF
# What ranks tell each other beside rows, and what the counters round.
LEAST, MOST = 0.99, 1.03


def bytes_sent(handle: Any) -> int:
    """Return the bytes that a GPU has sent over its links; raises NVMLError if it does not say."""
    import pynvml

    field = (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS)
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [field])
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(value.nvmlReturn)
    return 1024 * int(value.value.ullVal)


def reader_of(device: int) -> Callable[[], int] | None:
    """Return what reads these bytes of a GPU; None where nothing can."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        bytes_sent(handle)
    except pynvml.NVMLError:
        return None
    return lambda: bytes_sent(handle)


def count_both(group: Any, ranks_per_node: int) -> tuple[int, int] | None:
    """Dispatch; return the bytes that the buffer has counted and those of the links."""
    rank = dist.get_rank()
    read = reader_of(torch.cuda.current_device())
    if read is None:
        return None
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(NUM_TOKENS, HIDDEN, device="cuda", generator=generator).bfloat16()
    scores = torch.rand(NUM_TOKENS, NUM_EXPERTS, device="cuda", generator=generator)
    with Buffer(
        group,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=NUM_TOKENS,
        ranks_per_node=ranks_per_node,
        device="cuda",
        rail="lsa",
        num_low_latency_slots=0,
    ) as buffer:

        def dispatch() -> None:
            buffer.dispatch(x, scores.topk(NUM_TOPK).indices, recv_layout=RecvLayout.TOKEN)

        def settled() -> tuple[int, int]:
            torch.cuda.synchronize()
            meet(group)
            stats = buffer.stats()
            return stats.bytes_node + stats.bytes_network, read()

        dispatch()
        counted, sent = settled()
        for _ in range(NUM_DISPATCHES):
            dispatch()
        counted_after, sent_after = settled()
    return counted_after - counted, sent_after - sent


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_links_have_sent_what_was_counted(ranks_per_node: int) -> None:
    found = run_processes(in_process, 2, count_both, ranks_per_node, timeout_s=100.0)
    if None in found:
        pytest.skip("NVML (nvidia-ml-py) or its NVLink counters cannot be read here")
    for counted, sent in found:
        assert counted > NUM_DISPATCHES * NUM_TOKENS * HIDDEN
        assert LEAST <= sent / counted <= MOST, (sent, counted)
