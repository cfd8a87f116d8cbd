# SPDX-License-Identifier: Apache-2.0
"""Many operations of random sizes, options and routings, every result checked on the device.

    python benchmarks/soak.py --low-latency 100000 --high-throughput 10000

Low-latency steps are a dispatch and a combine, some split by their hooks; those of high throughput
draw a layout, a wire and a capacity, may repeat the routing with other rows, and combine with and
without weights. Without GPUs, ``--device cpu`` checks the CPU backend alike. Memory must not grow.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from soak_truth import SoakShape, Tokens, Truth, as_rows, as_sent, draw  # noqa: E402

from deepcomm import Buffer, RecvLayout  # noqa: E402
from deepcomm.testing import run_processes  # noqa: E402

TIMEOUT_S = 20.0  # of a wait on the device
CHECK_EVERY = 1000
SLACK_BYTES = 64 << 20  # that other programs may take of a GPU
LOW_LATENCY_LAYOUTS = (RecvLayout.EXPERT_PADDED, RecvLayout.TOKEN)
WIRES = (None, "fp32", "ue8m0")
ALIGNMENTS = (1, 16, 128)


class Soak:
    """A buffer, and random tokens that all ranks know."""

    def __init__(self, group: Any, shape: SoakShape, device: torch.device, **options: Any) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device)
        self.choices = np.random.default_rng(1)  # alike on all ranks
        self.num_operations = 0
        self.buffer = Buffer(
            group,
            num_experts=shape.experts,
            num_topk=shape.topk,
            hidden=shape.hidden,
            max_tokens_per_rank=shape.max_tokens,
            device=device,
            timeout_s=TIMEOUT_S,
            **options,
        )

    def draw(self, sizes: list[int] | None = None) -> Tokens:
        """Return tokens of all ranks, as many as drawn or as given."""
        if sizes is None:
            sizes = self.choices.integers(0, self.shape.max_tokens + 1, self.num_ranks).tolist()
        self.sizes = sizes
        return draw(self.generator, sizes, self.rank, self.shape)

    def truth(self, tokens: Tokens) -> Truth:
        return Truth(tokens, self.rank, self.num_ranks, self.shape.experts)

    def step(self, number: int) -> torch.Tensor:
        """Run and check some operations; return a bool on the device: all is right."""
        raise NotImplementedError

    def run(self, num_operations: int) -> None:
        """Run and check; raises within 1,000 steps of the first that is wrong."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        free: list[int] = []
        number, begin_s = 0, time.monotonic()
        while self.num_operations < num_operations:
            self.generator.manual_seed(number)
            wrong += ~self.step(number)
            number += 1
            if number % CHECK_EVERY == 0 or self.num_operations >= num_operations:
                assert wrong.item() == 0, f"rank {self.rank}: wrong in the last of {number} steps"
                free.append(free_bytes(self.device))
                self.report(free, time.monotonic() - begin_s)
        lost = free[min(1, len(free) - 1)] - free[-1]
        assert lost < SLACK_BYTES, f"rank {self.rank}: {lost} bytes fewer are free than after start"

    def report(self, free: list[int], elapsed_s: float) -> None:
        if self.rank == 0:
            text = f"{self.num_operations} operations right in {elapsed_s:.0f} s, {free[-1]} bytes"
            print(f"{type(self).__name__}: {text} free", file=sys.stderr, flush=True)


class LowLatencySoak(Soak):
    """A dispatch and its combine a step; the host waits for neither."""

    def step(self, number: int) -> torch.Tensor:
        tokens = self.draw()
        truth, own = self.truth(tokens), tokens.own
        hook, wire = number % 3 == 0, "fp32" if number % 2 else None
        layout = LOW_LATENCY_LAYOUTS[number % 5 == 0]
        got = self.buffer.low_latency_dispatch(
            tokens.x[own],
            tokens.ids[own],
            tokens.weights[own],
            recv_layout=layout,
            quantize="fp8_e4m3" if wire else None,
            return_hook=hook,
        )
        if hook:
            got.hook()
        rows, by_expert = got.x, layout is RecvLayout.EXPERT_PADDED
        if by_expert:
            rows = rows.flatten(0, 1)
        places = truth.places(layout, 1, got.x.shape[1])
        y = truth.outputs(rows.bfloat16(), places, layout).view(got.x.shape)
        back = self.buffer.low_latency_combine(
            y, got.handle, apply_weights=by_expert, return_hook=hook
        )
        if hook:
            back.hook()
        sent = as_sent(tokens.x, wire)
        expected = truth.sums(as_rows(sent), layout, weighted=by_expert)
        self.num_operations += 2
        return truth.is_received(got, sent, 1) & (back.x == expected).all()


@dataclass(frozen=True)
class Choice:
    """How a step of high throughput is done."""

    layout: RecvLayout
    wire: str | None
    alignment: int
    has_capacity: bool
    is_cast: bool
    is_async: bool
    repeats: bool

    @staticmethod
    def draw(random: np.random.Generator) -> Choice:
        layout = list(RecvLayout)[random.integers(3)]
        return Choice(
            layout=layout,
            wire=WIRES[random.integers(3)],
            alignment=ALIGNMENTS[random.integers(3)] if layout is RecvLayout.EXPERT else 1,
            has_capacity=bool(random.random() < 0.5),
            is_cast=bool(random.random() < 0.5),
            is_async=bool(random.random() < 0.3),
            repeats=bool(random.random() < 0.5),
        )


class HighThroughputSoak(Soak):
    """A dispatch, perhaps a repetition, and combines."""

    def step(self, number: int) -> torch.Tensor:
        del number
        choice, tokens = Choice.draw(self.choices), self.draw()
        truth = self.truth(tokens)
        got = self.dispatch(choice, tokens, None)
        is_right = self.check(choice, truth, got)
        if choice.repeats:
            other = self.draw(self.sizes)
            tokens = Tokens(other.x, tokens.ids, tokens.weights, tokens.own)
            truth = self.truth(tokens)
            got = self.dispatch(choice, tokens, got.handle)
            is_right &= self.check(choice, truth, got)
        return is_right

    def dispatch(self, choice: Choice, tokens: Tokens, handle: Any) -> Any:
        """Bring ``tokens``; cast on the way, or before."""
        own, x = tokens.own, tokens.x[tokens.own]
        options: dict[str, Any] = {"handle": handle, "async_op": choice.is_async}
        if choice.wire and choice.is_cast:
            options |= {"quantize": "fp8_e4m3", "scale_format": choice.wire}
        if handle is None:
            options["recv_layout"] = choice.layout
            if choice.layout is RecvLayout.EXPERT:
                options["expert_alignment"] = choice.alignment
            if choice.has_capacity and choice.layout is not RecvLayout.EXPERT_PADDED:
                options["num_recv_tokens"] = self.enough(choice)
        sent = x if choice.is_cast else as_sent(x, choice.wire)
        ids = tokens.ids[own] if handle is None else None
        got = self.buffer.dispatch(sent, ids, tokens.weights[own], **options)
        if choice.is_async:
            got.event.current_stream_wait()
        self.num_operations += 1
        return got

    def enough(self, choice: Choice) -> int:
        """Return a capacity that no routing exceeds."""
        num_tokens = self.num_ranks * self.shape.max_tokens
        if choice.layout is RecvLayout.TOKEN:
            return num_tokens
        num_local = self.shape.experts // self.num_ranks
        return num_tokens * min(self.shape.topk, num_local) + num_local * (choice.alignment - 1)

    def check(self, choice: Choice, truth: Truth, got: Any) -> torch.Tensor:
        """Compare a dispatch, and what combines bring back of it."""
        sent, layout = as_sent(truth.tokens.x, choice.wire), choice.layout
        is_right = truth.is_received(got, sent, choice.alignment)
        by_expert, block = layout is not RecvLayout.TOKEN, 0
        rows = got.x
        if layout is RecvLayout.EXPERT_PADDED:
            rows, block = rows.flatten(0, 1), rows.shape[1]
        places = truth.places(layout, choice.alignment, block)
        y = truth.outputs(rows.bfloat16(), places, layout).view(got.x.shape)
        for weighted in (False, True)[: 1 + by_expert]:
            back = self.buffer.combine(
                y, got.handle, apply_weights=weighted, async_op=choice.is_async
            )
            if choice.is_async:
                back.event.current_stream_wait()
            self.num_operations += 1
            is_right &= (back.x == truth.sums(as_rows(sent), layout, weighted=weighted)).all()
        return is_right


# ---- processes -------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU; 0 on CPUs."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def on_rank(group: Any, args: argparse.Namespace) -> None:
    rank = dist.get_rank(group)
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    shape = SoakShape(args.experts, args.topk, args.hidden, args.tokens)
    if args.low_latency:
        soak: Soak = LowLatencySoak(group, shape, device)
        soak.run(args.low_latency)
        soak.buffer.close()
    if args.high_throughput:
        soak = HighThroughputSoak(group, shape, device, num_low_latency_slots=0)
        soak.run(args.high_throughput)
        soak.buffer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--ranks", type=int, default=2, help="processes, one a GPU")
    add("--low-latency", type=int, default=100_000, help="operations")
    add("--high-throughput", type=int, default=10_000, help="operations")
    add("--tokens", type=int, default=128, help="largest T")
    add("--hidden", type=int, default=1024)
    add("--experts", type=int, default=256)
    add("--topk", type=int, default=8)
    add("--limit-s", type=float, default=540.0, help="then the ranks are killed")
    args = parser.parse_args()
    run_processes(on_rank, args.ranks, args, timeout_s=args.limit_s)


if __name__ == "__main__":
    main()
