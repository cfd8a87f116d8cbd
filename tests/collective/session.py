# SPDX-License-Identifier: Apache-2.0
"""Sessions: operations of one rank beside the reference.

Each operation of a ``Session`` runs on the buffer and in ``deepcomm.reference``, and the results
are compared bit for bit. All ranks must call the same operations in the same order, as with the
buffer itself; the reference is computed once for all ranks of a process.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from collective.case import (
    Case,
    Inputs,
    in_larger_tensor,
    make_inputs,
    make_outputs,
    make_row_weights,
)

from deepcomm import ScaledTensor, reference
from deepcomm.testing.oracle import (
    assert_combine_equal,
    assert_dispatch_equal,
    poison,
    random_payload,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet
    from types import TracebackType

    from deepcomm.types import CombineOutput, DispatchOutput


MAX_RESULTS = 256


class Oracle:
    """Results that the ranks of this process share, computed by whoever asks first.

    The oldest of many are forgotten, and computed again if somebody still asks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: dict[Any, Any] = {}

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._results:
                while len(self._results) >= MAX_RESULTS:
                    self._results.pop(next(iter(self._results)))
                self._results[key] = compute()
            return self._results[key]


@dataclass(eq=False)
class Dispatched:
    """A dispatch: what this rank got, what all ranks should have got, and its inputs."""

    actual: DispatchOutput
    expected: list[Any]
    inputs: Inputs
    round_idx: int
    finish: Callable[[], None] = field(default=lambda: None)


@dataclass(eq=False)
class Combined:
    """A combine, to be finished by its hook where it has one."""

    actual: CombineOutput
    finish: Callable[[], None] = field(default=lambda: None)


class Session:
    """One rank of a case: its buffer, and the reference beside it."""

    def __init__(
        self, group: Any, case: Case, oracle: Oracle | None = None, **options: Any
    ) -> None:
        self.case = case
        self.group = group
        self.buffer = case.open(group, **options)
        self.rank = self.buffer.rank
        self._oracle = oracle or Oracle()
        self._step = 0
        self._random = np.random.default_rng(self.rank)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.buffer.close()

    def _begin(self, compute: Callable[[], Any]) -> Any:
        """Wait a random while; return what the next operation should give, on all ranks."""
        self._step += 1
        if self.case.delay_ms:
            time.sleep(self._random.uniform(0, self.case.delay_ms) / 1000)
        return self._oracle.get(self._step, compute)

    @property
    def step(self) -> int:
        """Number of operations so far, or since where ``rewind`` led."""
        return self._step

    def rewind(self, step: int) -> None:
        """Repeat from here what was done after ``step``: the reference's results are at hand."""
        self._step = step

    def inputs(self, round_idx: int) -> Inputs:
        """Return what all ranks bring in a round."""
        return self._oracle.get(("inputs", round_idx), lambda: make_inputs(self.case, round_idx))

    def _own(self, tensors: list[Any] | None) -> Any:
        """Return this rank's tensor as the case wants it given."""
        if tensors is None:
            return None
        own = tensors[self.rank]
        if isinstance(own, ScaledTensor):
            return ScaledTensor(*(self._own({self.rank: part}) for part in (own.data, own.scales)))
        own = own.to(self.case.device)
        return in_larger_tensor(own) if self.case.strided else own

    # ---- dispatch

    def dispatch(
        self,
        round_idx: int = 0,
        *,
        cached: Dispatched | None = None,
        has_weights: bool = True,
        zero_padding: bool = False,
        **options: Any,
    ) -> Dispatched:
        """Run and compare a dispatch; ``cached`` repeats the routing of another."""
        case, inputs = self.case, self.inputs(round_idx)
        weights = inputs.weights if has_weights else None
        shared = {**case.quantize, "zero_padding": zero_padding}
        if cached is None:
            routing = {"recv_layout": case.layout, "expert_alignment": case.alignment}
            ids, own = inputs.ids, {**routing, "num_recv_tokens": case.capacity}
            other = {**routing, "capacities": [case.capacity] * case.num_ranks}
        else:
            ids, own = None, {"handle": cached.actual.handle}
            other = {"handles": [output.handle for output in cached.expected]}
        expected = self._begin(
            lambda: reference.dispatch(
                inputs.xs, ids, weights, config=case.config, **other, **shared
            )
        )
        actual = self.buffer.dispatch(
            self._own(inputs.xs), self._own(ids), self._own(weights), **own, **shared, **options
        )
        wait_for(actual)
        assert_dispatch_equal(
            actual, expected[self.rank], zero_padding=zero_padding, rank=self.rank
        )
        return Dispatched(actual, expected, inputs, round_idx)

    def low_latency_dispatch(
        self,
        round_idx: int = 0,
        *,
        has_weights: bool = True,
        zero_padding: bool = False,
        masked: AbstractSet[int] = frozenset(),
        **options: Any,
    ) -> Dispatched:
        """Run a dispatch and compare it, in ``finish`` where it returns a hook."""
        case, inputs = self.case, self.inputs(round_idx)
        weights = inputs.weights if has_weights else None
        shared = {**case.quantize, "recv_layout": case.layout, "zero_padding": zero_padding}
        expected = self._begin(
            lambda: reference.low_latency_dispatch(
                inputs.xs, inputs.ids, weights, config=case.config, masked=masked, **shared
            )
        )
        actual = self.buffer.low_latency_dispatch(
            self._own(inputs.xs), self._own(inputs.ids), self._own(weights), **shared, **options
        )

        def finish() -> None:
            if actual.hook is not None:
                actual.hook()
            wait_for(actual)
            assert_dispatch_equal(
                actual, expected[self.rank], zero_padding=zero_padding, rank=self.rank
            )

        return self._finished(Dispatched(actual, expected, inputs, round_idx, finish))

    def _finished(self, operation: Any) -> Any:
        if operation.actual.hook is None:
            operation.finish()
        return operation

    # ---- combine

    def outputs(self, dispatched: Dispatched, round_idx: int) -> list[Any]:
        """Return the expert outputs of all ranks, None for those that are masked."""
        return [
            None if expected is None else make_outputs(self.case, expected, rank, round_idx)
            for rank, expected in enumerate(dispatched.expected)
        ]

    def _carried(self, dispatched: Dispatched, round_idx: int) -> list[Any]:
        return [
            None if expected is None else make_row_weights(expected, rank, round_idx)
            for rank, expected in enumerate(dispatched.expected)
        ]

    def _biases(self, round_idx: int) -> list[torch.Tensor]:
        case = self.case
        return [
            random_payload(
                rank, case.tokens_of(rank), case.hidden, dtype=case.y_dtype, seed=2000 + round_idx
            )
            for rank in range(case.num_ranks)
        ]

    def combine(
        self,
        dispatched: Dispatched,
        *,
        in_place: bool = False,
        carried: bool = False,
        apply_weights: bool = False,
        extras: bool = False,
        **options: Any,
    ) -> Combined:
        """Run and compare a combine.

        Args:
            dispatched: Whose handle to use.
            in_place: Give the outputs in the tensor that dispatch returned, and spoil that tensor
                as soon as the call has returned.
            carried: Carry weights back.
            apply_weights: Multiply with the recorded weights.
            extras: Add a bias, and receive into a tensor of ours.
            **options: Passed on.
        """
        step = self._step
        ys = self.outputs(dispatched, step)
        weights = self._carried(dispatched, step) if carried else None
        biases = self._biases(step) if extras else None
        expected = self._begin(
            lambda: reference.combine(
                ys,
                [output.handle for output in dispatched.expected],
                topk_weights=weights,
                apply_weights=apply_weights,
                biases=biases,
            )
        )
        y = dispatched.actual.x.copy_(ys[self.rank]) if in_place else self._own(ys)
        actual = self.buffer.combine(
            y,
            dispatched.actual.handle,
            topk_weights=self._own(weights),
            apply_weights=apply_weights,
            bias=self._own(biases),
            out=self._out() if extras else None,
            **options,
        )
        wait_for(actual)
        if in_place:
            poison(y)
        assert_combine_equal(actual, expected[self.rank], rank=self.rank)
        return Combined(actual)

    def low_latency_combine(
        self,
        dispatched: Dispatched,
        *,
        override: bool = False,
        carried: bool = False,
        apply_weights: bool = True,
        extras: bool = False,
        masked: AbstractSet[int] = frozenset(),
        **options: Any,
    ) -> Combined:
        """Run a combine and compare it, in ``finish`` where it returns a hook.

        ``override``: apply other weights than those recorded. The rest is as for ``combine``.
        """
        step = self._step
        ys = self.outputs(dispatched, step)
        weights = self._carried(dispatched, step) if carried else None
        source = self.inputs(dispatched.round_idx + 50).weights if override else None
        biases = self._biases(step) if extras else None
        expected = self._begin(
            lambda: reference.low_latency_combine(
                ys,
                [None if output is None else output.handle for output in dispatched.expected],
                topk_weights=weights,
                source_weights=source,
                apply_weights=apply_weights,
                biases=biases,
                masked=masked,
            )
        )
        actual = self.buffer.low_latency_combine(
            self._own(ys),
            dispatched.actual.handle,
            topk_weights=self._own(weights or source),
            apply_weights=apply_weights,
            bias=self._own(biases),
            out=self._out() if extras else None,
            **options,
        )

        def finish() -> None:
            if actual.hook is not None:
                actual.hook()
            wait_for(actual)
            assert_combine_equal(actual, expected[self.rank], rank=self.rank)

        return self._finished(Combined(actual, finish))

    def _out(self) -> torch.Tensor:
        case = self.case
        shape = (case.tokens_of(self.rank), case.hidden)
        return poison(torch.empty(shape, dtype=case.y_dtype, device=case.device))


def wait_for(output: DispatchOutput | CombineOutput) -> None:
    """Let what follows on this stream see the results of an asynchronous operation."""
    if output.event is not None:
        output.event.current_stream_wait()
