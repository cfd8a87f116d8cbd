# SPDX-License-Identifier: Apache-2.0
"""The worked example of csrc/kernels/PROTOCOLS.md: its arrays, as kernels leave them."""

from __future__ import annotations

import ctypes
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from emulated.build import CSRC
from emulated.cluster import Settings
from emulated.runtime import run_emulated

from deepcomm import Buffer, RecvLayout

pytestmark = pytest.mark.emulated_backend

if TYPE_CHECKING:
    from deepcomm import DispatchOutput
    from deepcomm.testing import LocalGroup

NUM_RANKS, NUM_EXPERTS, HIDDEN, MAX_TOKENS, NUM_GENERATIONS = 2, 4, 8, 8, 2
IDS = ([[0, 2], [3, 2]], [[0, 3]])
WEIGHTS = ([[0.5, 0.25], [0.5, 0.5]], [[0.5, 1.0]])
LETTERS = ("ab", "c")  # every element of a row is its letter's place in the alphabet

# csrc/layout/exchange.hpp asserts these for the same shape.
COUNTS, ARRIVED, SENT_CHUNKS, PUSHED_CHUNKS = 1024, 2048, 3072, 4096
NUM_COUNTERS = NUM_RANKS + NUM_EXPERTS
SENT_CHUNKS_OF_RANK, PUSHED_CHUNKS_OF_RANK = MAX_TOKENS // 8, MAX_TOKENS // 4

ROW = re.compile(r"^\| `([^`]+)` \|[^|]*\| `([^`]*)` \| `([^`]*)` \|$", re.MULTILINE)


def printed() -> dict[str, tuple[str, str]]:
    """Return the arrays of the document: by name, on rank 0 and on rank 1."""
    text = (CSRC / "kernels" / "PROTOCOLS.md").read_text().split("\n## worked example\n")[1]
    rows = ROW.findall(text.split("\n## ")[0])
    arrays = {name: (on_first, on_second) for name, on_first, on_second in rows}
    assert len(arrays) == len(rows), "a name occurs twice"
    return arrays


def show(values: Any) -> str:
    """Return an array as the document writes it: rows are separated by slashes."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if values and isinstance(values[0], list):
        return " / ".join(show(row) for row in values)
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def letters(rows: torch.Tensor) -> str:
    """Return rows by their letters, a dot for one that holds no token."""
    assert bool((rows == rows[:, :1]).all()), "a row is torn"
    return "".join(chr(ord("a") - 1 + int(value)) if value else "." for value in rows[:, 0])


class Words:
    """A rank's symmetric memory, as its peers have left it."""

    def __init__(self, buffer: Buffer) -> None:
        exchange = buffer._backend.engine.domain.exchange  # type: ignore[attr-defined]
        self.layout = exchange.layout
        self._base = exchange.memory.bases[buffer.rank]

    def read(self, kind: Any, offset: int, count: int) -> list[Any]:
        return list((kind * count).from_address(self._base + offset))

    def rows(self, offset: int, count: int) -> torch.Tensor:
        bits = self.read(ctypes.c_int16, offset, count * HIDDEN)
        return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).view(count, HIDDEN)

    def counts_from(self, src: int, epoch: int) -> str:
        """Return what a rank has announced: tokens for each rank, then pairs of each expert."""
        offset = COUNTS + (epoch % 2 * NUM_RANKS + src) * 8 * NUM_COUNTERS
        words = self.read(ctypes.c_uint64, offset, NUM_COUNTERS)
        assert [word >> 32 for word in words] == [epoch] * NUM_COUNTERS
        return show([word & 0xFFFFFFFF for word in words])

    def pushed_chunk(self, src: int) -> str:
        """Return the epoch of a rank's first chunk of a combine."""
        offset = PUSHED_CHUNKS + 4 * PUSHED_CHUNKS_OF_RANK * src
        return show(self.read(ctypes.c_uint32, offset, 1))


def play_experts(buffer: Buffer, arguments: tuple[torch.Tensor, ...]) -> dict[str, str]:
    """Dispatch to an expert layout and combine, operations 1 and 2 of the buffer."""
    output = buffer.dispatch(
        *arguments, recv_layout=RecvLayout.EXPERT, expert_alignment=4, zero_padding=True
    )
    result = dispatched(buffer, output)
    buffer.group.barrier()  # what has been read is written again below
    words, peer, record = Words(buffer), 1 - buffer.rank, output.handle.records
    summed = buffer.combine(output.x, output.handle, apply_weights=True)
    num_back = int((record.token_slot[record.topk_idx // 2 == peer] >= 0).sum())
    back = words.layout.areas.generation(NUM_GENERATIONS)  # the combine region follows the last one
    result |= {
        "pushed_chunk of the peer": words.pushed_chunk(peer),
        "combine rows": show(words.rows(back, num_back)[:, 0]),
        "combined": show(summed.x[:, 0]),
    }
    buffer.group.barrier()
    return result


def dispatched(buffer: Buffer, output: DispatchOutput) -> dict[str, str]:
    """Return what operation 1 has left."""
    words, peer = Words(buffer), 1 - buffer.rank
    record = output.handle.records
    plan = record.plan.tolist()
    begin, end = plan[peer], plan[peer + 1]
    landing = words.layout.areas.generation(0) + words.layout.areas.landing.rows
    return {
        "topk_idx": show(record.topk_idx),
        "topk_weights": show(output.handle.topk_weights),
        "counts of rank 0": words.counts_from(0, epoch=1),
        "counts of rank 1": words.counts_from(1, epoch=1),
        "token_slot": show(record.token_slot),
        "pair_slot": show(record.pair_slot),
        "plan: rows_from": show(plan[:3]),
        "plan: push_base": show(plan[3 + peer : 4 + peer]),
        "plan: sent_base": show(plan[5:7]),
        "plan: combine_base": show(plan[7 + peer : 8 + peer]),
        "plan: capacity": show(plan[9:11]),
        "plan: tokens_from": show(plan[11:13]),
        "plan: made": show(plan[13:]),
        "num_tokens_per_expert": show(output.num_tokens_per_expert),
        "expert_offsets": show(output.expert_offsets),
        "num_recv_tokens": str(int(output.num_recv_tokens)),
        "sent_chunk of the peer": show(
            words.read(ctypes.c_uint32, SENT_CHUNKS + 16 * SENT_CHUNKS_OF_RANK * peer, 4)
        ),
        "landed: rows": letters(words.rows(landing + 2 * HIDDEN * begin, end - begin)),
        "row_slots": show(record.row_slots[begin:end]),
        "row_weights": show(record.row_weights[begin:end]),
        "x": letters(output.x),
        "weights of x": show(output.topk_weights),
        "arrived": show(words.read(ctypes.c_uint32, ARRIVED, NUM_RANKS)),
    }


def play_tokens(buffer: Buffer, arguments: tuple[torch.Tensor, ...]) -> dict[str, str]:
    """The same in TOKEN order, operations 3 and 4."""
    words, peer = Words(buffer), 1 - buffer.rank
    output = buffer.dispatch(*arguments)
    buffer._backend.runtime.flush()  # type: ignore[attr-defined]
    result = {
        "TOKEN: x": letters(output.x),
        "TOKEN: topk_idx": show(output.topk_idx),
        "TOKEN: topk_weights": show(output.topk_weights),
        "TOKEN: arrived": show(words.read(ctypes.c_uint32, ARRIVED, NUM_RANKS)),
    }
    buffer.group.barrier()
    summed = buffer.combine(output.x, output.handle)
    result |= {
        "TOKEN: pushed_chunk of the peer": words.pushed_chunk(peer),
        "TOKEN: combined": show(summed.x[:, 0]),
    }
    buffer.group.barrier()
    return result


def play(group: LocalGroup) -> dict[str, str]:
    places = [float(ord(letter) - ord("a") + 1) for letter in LETTERS[group.rank]]
    x = torch.tensor(places, dtype=torch.bfloat16)[:, None].expand(-1, HIDDEN).contiguous()
    arguments = (x, torch.tensor(IDS[group.rank]), torch.tensor(WEIGHTS[group.rank]))
    sizes = {"num_experts": NUM_EXPERTS, "num_topk": 2, "max_tokens_per_rank": MAX_TOKENS}
    rings = {"num_generations": NUM_GENERATIONS, "num_low_latency_slots": 0}
    with Buffer(group, hidden=HIDDEN, **sizes, **rings) as buffer:
        return play_experts(buffer, arguments) | play_tokens(buffer, arguments)


def test_worked_example_is_what_the_kernels_do() -> None:
    for seed in range(3):
        first, second = run_emulated(play, NUM_RANKS, Settings(seed))
        assert printed() == {name: (first[name], second[name]) for name in first}
