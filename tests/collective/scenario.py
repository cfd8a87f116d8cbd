# SPDX-License-Identifier: Apache-2.0
"""Cases of the collective tests, and sessions that run operations beside the reference.

A ``Session`` is one rank: each of its operations runs on the buffer and in ``deepcomm.reference``,
and the results are compared bit for bit. All ranks must call the same operations in the same order,
as with the buffer itself; the reference is computed once for all ranks of a process.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from deepcomm import Buffer, RecvLayout, ScaledTensor, reference
from deepcomm.fp8 import quantize_fp8
from deepcomm.slots import ReferenceConfig
from deepcomm.testing.oracle import (
    RoutingKind,
    assert_combine_equal,
    assert_dispatch_equal,
    encoded_payload,
    poison,
    random_payload,
    routed_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet
    from types import TracebackType

    from deepcomm.types import CombineOutput, DispatchOutput

Wire = Literal["bf16", "fp16", "fp32", "fp8", "fp8_ue8m0", "scaled", "scaled_ue8m0"]

WIRES: tuple[Wire, ...] = get_args(Wire)
"""How rows travel: in their dtype, cast to FP8 on the way, or as a ``ScaledTensor``."""

DEVICES = ("cpu",)
"""Backends that run the matrix."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIZES_OF_RANKS = (1.0, 0.0, 0.5, 0.8, 0.1)
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration of ranks, shapes and options.

    Attributes:
        num_tokens: ``max_tokens_per_rank``; ranks bring that many or fewer, rank 1 none.
        even: All ranks bring ``num_tokens``.
        strided: Rows, ids and outputs are parts of larger tensors.
        delay_ms: Longest random delay before each operation.
    """

    num_ranks: int = 4
    ranks_per_node: int | None = None
    num_tokens: int = 16
    even: bool = False
    hidden: int = 64
    num_topk: int = 2
    experts_per_rank: int = 2
    layout: RecvLayout = RecvLayout.TOKEN
    wire: Wire = "bf16"
    routing: RoutingKind = "sparse"
    id_dtype: torch.dtype = torch.int64
    alignment: int = 1
    capacity: int | None = None
    strided: bool = False
    num_threads: int | None = None
    delay_ms: float = 0.0
    device: str = "cpu"

    @property
    def num_experts(self) -> int:
        return self.num_ranks * self.experts_per_rank

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // (self.ranks_per_node or self.num_ranks)

    @property
    def id(self) -> str:
        """Name of the case: the sizes, and what differs from the defaults."""
        sizes = f"ep{self.num_ranks}-n{self.num_nodes}-t{self.num_tokens}-h{self.hidden}"
        words = [sizes, f"k{self.num_topk}", self.layout.value, self.wire]
        default = Case()
        named = ("routing", "alignment", "capacity", "num_threads", "device")
        words += [
            f"{name.split('_')[-1]}{value}" if isinstance(value, int) else str(value)
            for name in named
            if (value := getattr(self, name)) != getattr(default, name)
        ]
        words += [name for name in ("even", "strided") if getattr(self, name)]
        words += ["int32"] if self.id_dtype == torch.int32 else []
        words += [f"e{self.experts_per_rank}"] if self.experts_per_rank != 2 else []
        return "-".join(words)

    @property
    def quantize(self) -> dict[str, Any]:
        """Options of dispatch that choose the wire."""
        if not self.wire.startswith("fp8"):
            return {}
        return {
            "quantize": "fp8_e4m3",
            "scale_format": "ue8m0" if self.wire == "fp8_ue8m0" else "fp32",
        }

    @property
    def y_dtype(self) -> torch.dtype:
        return DTYPES.get(self.wire, torch.bfloat16)

    @property
    def config(self) -> ReferenceConfig:
        return ReferenceConfig(
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            ranks_per_node=self.ranks_per_node or self.num_ranks,
            max_tokens_per_rank=self.num_tokens,
        )

    def tokens_of(self, rank: int) -> int:
        """Return T of a rank."""
        if self.even or self.num_ranks == 1:
            return self.num_tokens
        return int(self.num_tokens * SIZES_OF_RANKS[rank % len(SIZES_OF_RANKS)])

    def open(self, group: Any, **options: Any) -> Buffer:
        """Construct the buffer."""
        shape = {
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,
            "hidden": self.hidden,
            "max_tokens_per_rank": self.num_tokens,
            "ranks_per_node": self.ranks_per_node,
            "num_threads": self.num_threads,
            "device": self.device,
            "timeout_s": TIMEOUT_S,
        }
        return Buffer(group, **(shape | options))


def case_params(cases: list[Case]) -> dict[str, Any]:
    """Return arguments of ``pytest.mark.parametrize`` that run cases on every backend."""
    all_cases = [replace(case, device=device) for device in DEVICES for case in cases]
    return {"argnames": "case", "argvalues": all_cases, "ids": [case.id for case in all_cases]}


# ---- Inputs: pure functions of case, rank and round ------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What all ranks bring to one dispatch, by rank."""

    xs: list[Any]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]


def make_inputs(case: Case, round_idx: int) -> Inputs:
    """Return rows, ids and weights of all ranks; rounds differ in all three."""
    ranks = range(case.num_ranks)
    routed = [
        routed_tokens(
            case.routing, case.config, rank, case.tokens_of(rank), case.num_topk, seed=round_idx
        )
        for rank in ranks
    ]
    return Inputs(
        xs=[make_rows(case, rank, round_idx) for rank in ranks],
        ids=[tokens.topk_idx.to(case.id_dtype) for tokens in routed],
        weights=[tokens.topk_weights + round_idx for tokens in routed],
    )


def make_rows(case: Case, rank: int, round_idx: int) -> torch.Tensor | ScaledTensor:
    """Return the rows of one rank: encoded, or random where they are to be cast."""
    size = (rank, case.tokens_of(rank), case.hidden)
    if case.wire in DTYPES:
        return encoded_payload(*size, dtype=DTYPES[case.wire], round_idx=round_idx)
    rows = random_payload(*size, seed=round_idx)
    if case.wire.startswith("fp8"):
        return rows
    return quantize_fp8(rows, "ue8m0" if case.wire == "scaled_ue8m0" else "fp32")


def make_outputs(case: Case, expected: DispatchOutput, rank: int, round_idx: int) -> torch.Tensor:
    """Return the expert outputs of one rank; NaN in rows that hold no token."""
    num_rows = expected.handle.num_rows
    rows = random_payload(rank, num_rows, case.hidden, dtype=case.y_dtype, seed=1000 + round_idx)
    place = expected.handle.records.placements_r[rank]
    holds_token = torch.zeros(num_rows, dtype=torch.bool)
    holds_token[place.slot_p[place.delivered_p]] = True
    rows[~holds_token] = torch.nan
    return rows.view(expected.x.shape)


def make_row_weights(expected: DispatchOutput, rank: int, round_idx: int) -> torch.Tensor:
    """Return float32 weights to be carried back, in the shape of the layout."""
    topk = expected.topk_idx
    shape = expected.x.shape[:-1] if topk is None else topk.shape
    generator = torch.Generator().manual_seed(round_idx * 100 + rank)
    return torch.randn(shape, generator=generator)


def in_larger_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same elements or rows, every other one of a poisoned, wider tensor."""
    if tensor.ndim == 1:
        return poison(tensor.new_empty(2 * len(tensor)))[::2].copy_(tensor)
    *blocks, num_rows, width = tensor.shape
    wider = poison(tensor.new_empty(*blocks, 2 * num_rows, width + 16))
    return wider[..., ::2, :width].copy_(tensor)


# ---- The reference, once for all ranks -------------------------------------------------------


class Oracle:
    """Results that the ranks of this process share, computed by whoever asks first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: dict[Any, Any] = {}

    def get(self, key: Any, compute: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._results:
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
        has_bias: bool = False,
        has_out: bool = False,
    ) -> Combined:
        """Run and compare a combine.

        Args:
            dispatched: Whose handle to use.
            in_place: Give the outputs in the tensor that dispatch returned, and spoil that tensor
                as soon as the call has returned.
            carried: Carry weights back.
            apply_weights: Multiply with the recorded weights.
            has_bias: Add a bias.
            has_out: Receive into a tensor of ours.
        """
        step = self._step
        ys = self.outputs(dispatched, step)
        weights = self._carried(dispatched, step) if carried else None
        biases = self._biases(step) if has_bias else None
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
            out=self._out() if has_out else None,
        )
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
        has_bias: bool = False,
        has_out: bool = False,
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
        biases = self._biases(step) if has_bias else None
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
            out=self._out() if has_out else None,
            **options,
        )

        def finish() -> None:
            if actual.hook is not None:
                actual.hook()
            assert_combine_equal(actual, expected[self.rank], rank=self.rank)

        return self._finished(Combined(actual, finish))

    def _out(self) -> torch.Tensor:
        case = self.case
        shape = (case.tokens_of(self.rank), case.hidden)
        return poison(torch.empty(shape, dtype=case.y_dtype, device=case.device))

    # ---- poison

    def spoil(self, num_rounds: int = 4) -> None:
        """Leave NaN in every landing area and low-latency slot that the case will use."""
        case = self.case
        shape = (case.num_tokens, case.hidden)
        dtype = DTYPES.get(case.wire, torch.bfloat16)
        x = torch.full(shape, torch.nan, dtype=dtype, device=case.device)
        ids = torch.arange(case.num_topk, device=case.device) + self.rank * case.experts_per_rank
        ids = (ids % case.num_experts).repeat(case.num_tokens, 1)
        weights = torch.full(ids.shape, torch.nan, device=case.device)
        scales = "ue8m0" if case.wire.endswith("ue8m0") else "fp32"
        quantize = {} if case.wire in DTYPES else {"quantize": "fp8_e4m3", "scale_format": scales}
        for _ in range(num_rounds):
            received = self.buffer.dispatch(
                x, ids, weights, recv_layout=case.layout, owned=True, **quantize
            )
            y = torch.full(received.x.shape, torch.nan, dtype=case.y_dtype)
            self.buffer.combine(y, received.handle, topk_weights=received.topk_weights)
        if case.layout is RecvLayout.EXPERT or self.buffer.config.num_low_latency_slots == 0:
            return
        for _ in range(num_rounds):
            received = self.buffer.low_latency_dispatch(
                x, ids, weights, recv_layout=case.layout, **quantize
            )
            y = torch.full(received.x.shape, torch.nan, dtype=case.y_dtype)
            self.buffer.low_latency_combine(y, received.handle)


# ---- Scenarios: the same in threads and in processes -----------------------------------------


def exchange(group: Any, case: Case, oracle: Oracle | None = None) -> None:
    """High throughput: every kind of dispatch and combine once, on spoilt memory."""
    with Session(group, case, oracle) as session:
        session.spoil()
        first = session.dispatch(0, zero_padding=True)
        if case.wire in DTYPES:
            session.combine(first, in_place=True)
        session.combine(first)
        session.combine(first, carried=True, has_bias=True, has_out=True)
        other = session.dispatch(1, has_weights=False)
        if case.layout is not RecvLayout.TOKEN:
            session.combine(first, apply_weights=True, has_bias=True)
        again = session.dispatch(2, cached=first)
        session.combine(other, carried=True)
        session.combine(again, apply_weights=case.layout is not RecvLayout.TOKEN)
        session.combine(first)
        session.dispatch(3, cached=again, has_weights=False)


def low_latency_exchange(group: Any, case: Case, oracle: Oracle | None = None) -> None:
    """Low latency: the same, with three operations in flight."""
    with Session(group, case, oracle) as session:
        session.spoil()
        first = session.low_latency_dispatch(0, zero_padding=True)
        session.low_latency_combine(first, has_bias=True, has_out=True)
        flying = [session.low_latency_dispatch(i, return_hook=True) for i in (1, 2)]
        back = session.low_latency_combine(
            first, carried=True, apply_weights=False, return_hook=True
        )
        for operation in (*flying, back):
            operation.finish()
        bare = session.low_latency_dispatch(3, has_weights=False, return_hook=True)
        returning = [
            session.low_latency_combine(
                flight, override=case.layout is not RecvLayout.TOKEN, return_hook=True
            )
            for flight in flying
        ]
        for operation in (bare, *returning):
            operation.finish()
        session.low_latency_combine(bare, apply_weights=False)
