# SPDX-License-Identifier: Apache-2.0
"""Large results that are no views: their memory is used again, bounded, and never too early."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deepcomm import Buffer
from deepcomm.testing import LocalCluster

if TYPE_CHECKING:
    from collections.abc import Callable

    from deepcomm import DispatchOutput

NUM_RANKS = 2
NUM_TOKENS = 128
HIDDEN = 2048
RESULT_BYTES = NUM_TOKENS * HIDDEN * 2
PASSED_BY = 64
"""Results after which idle memory is freed."""


@dataclass(eq=False)
class Rank:
    """One rank's buffer with a dispatch to combine again and again."""

    buffer: Buffer
    output: DispatchOutput

    def combine(self, value: float) -> torch.Tensor:
        """Return [T, H] of one value: each token visits one rank."""
        return self.buffer.combine(torch.full_like(self.output.x, value), self.output.handle).x

    def dispatch(self, num_tokens: int) -> DispatchOutput:
        ids = torch.arange(num_tokens)[:, None] % 2
        x = torch.zeros(num_tokens, HIDDEN, dtype=torch.bfloat16)
        return self.buffer.dispatch(x, ids, owned=True)

    @property
    def endpoint(self) -> Any:
        return self.buffer._backend._endpoint  # type: ignore[attr-defined]


def run(body: Callable[[Rank], Any]) -> list[Any]:
    def on_rank(group: Any) -> Any:
        with Buffer(
            group,
            device="cpu",
            num_experts=2,
            num_topk=1,
            hidden=HIDDEN,
            max_tokens_per_rank=NUM_TOKENS,
            timeout_s=60,
        ) as buffer:
            rank = Rank(buffer, None)  # type: ignore[arg-type]
            rank.output = rank.dispatch(NUM_TOKENS)
            result = body(rank)
            del rank.output
            return result

    return LocalCluster(NUM_RANKS).run(on_rank)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(text, 16) for text in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def test_memory_of_a_result_that_is_gone_is_used_again() -> None:
    def body(rank: Rank) -> None:
        addresses = {rank.combine(value).data_ptr() for value in range(10)}
        assert len(addresses) == 1
        kept = rank.combine(11)
        assert {rank.dispatch(NUM_TOKENS).x.data_ptr() for _ in range(10)}.isdisjoint(addresses)
        assert kept.data_ptr() in addresses

    run(body)


def test_memory_in_use_is_left_alone() -> None:
    def body(rank: Rank) -> None:
        kept = [rank.combine(value) for value in range(4)]
        parts = [rank.combine(value)[3:5, 7:9].view(torch.int16) for value in range(4)]
        for value in range(10, 20):
            rank.combine(value)
        for value, (whole, part) in enumerate(zip(kept, parts, strict=True)):
            assert bool((whole == value).all())
            assert bool((part.view(torch.bfloat16) == value).all())

    run(body)


def test_results_outlive_their_buffer() -> None:
    results = run(lambda rank: rank.combine(5))
    gc.collect()
    addresses = [result.data_ptr() for result in results]
    assert all(bool((result == 5).all()) for result in results)
    assert all(is_mapped(address) for address in addresses)
    del results
    assert not any(is_mapped(address) for address in addresses)


def test_idle_memory_is_bounded() -> None:
    def body(rank: Rank) -> None:
        limit = rank.endpoint.max_idle_result_bytes
        assert limit == NUM_RANKS * RESULT_BYTES  # one landing area
        kept = [rank.combine(value) for value in range(10)]
        assert rank.endpoint.idle_result_bytes == 0
        while kept:
            kept.pop()
            assert rank.endpoint.idle_result_bytes <= limit
        assert rank.endpoint.idle_result_bytes == limit
        rank.buffer.close()
        assert rank.endpoint.idle_result_bytes == 0

    run(body)


def test_memory_that_no_result_wants_is_freed() -> None:
    def body(rank: Rank) -> None:
        rank.combine(1)
        assert rank.endpoint.idle_result_bytes == RESULT_BYTES
        for _ in range(PASSED_BY + 1):
            rank.dispatch(NUM_TOKENS // 2)
        assert rank.endpoint.idle_result_bytes == RESULT_BYTES // 2

    run(body)


def test_results_may_be_dropped_by_any_thread() -> None:
    def body(rank: Rank) -> None:
        kept: list[tuple[float, torch.Tensor]] = []
        dropped = threading.Event()

        def drop() -> None:
            while not dropped.is_set() or kept:
                if kept:
                    value, result = kept.pop()
                    assert bool((result == value).all())

        dropper = threading.Thread(target=drop)
        dropper.start()
        for value in range(200):
            kept.append((value % 128, rank.combine(value % 128)))
        dropped.set()
        dropper.join()
        assert rank.endpoint.idle_result_bytes <= rank.endpoint.max_idle_result_bytes

    run(body)


def test_a_forked_child_may_drop_results() -> None:
    def body(rank: Rank) -> None:
        result = rank.combine(3)
        child = os.fork()
        if child == 0:
            del result
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert bool((result == 3).all())

    run(body)


def test_buffers_leave_no_memory_behind() -> None:
    def num_mappings() -> int:
        gc.collect()
        return len(Path("/proc/self/maps").read_text().splitlines())

    def body(rank: Rank) -> None:
        kept = [rank.combine(value) for value in range(3)]
        kept.pop()

    run(body)
    before = num_mappings()
    for _ in range(20):
        run(body)
    assert num_mappings() <= before + 10
