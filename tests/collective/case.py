# SPDX-License-Identifier: Apache-2.0
"""Cases of the collective tests: one configuration each, and what its ranks bring.

Inputs are pure functions of case, rank and round, so that any rank knows what all the others send.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest
import torch

from deepcomm import Buffer, RecvLayout, ScaledTensor
from deepcomm.fp8 import quantize_fp8
from deepcomm.slots import ReferenceConfig
from deepcomm.testing.oracle import (
    RoutingKind,
    encoded_payload,
    poison,
    random_payload,
    routed_tokens,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepcomm.types import DispatchOutput


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
        sizes: What each rank brings instead, at most ``num_tokens``.
        strided: Rows, ids and outputs are parts of larger tensors.
        delay_ms: Longest random delay before each operation.
    """

    num_ranks: int = 4
    ranks_per_node: int | None = None
    num_tokens: int = 16
    even: bool = False
    sizes: tuple[int, ...] | None = None
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
    rail: str = "auto"

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
        named = ("routing", "alignment", "capacity", "num_threads", "device", "rail")
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
        if self.sizes is not None:
            return self.sizes[rank]
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
            "rail": self.rail,
            "timeout_s": TIMEOUT_S,
        }
        return Buffer(group, **(shape | options))


def case_params(cases: list[Case], slow: Sequence[Case] = ()) -> dict[str, Any]:
    """Return arguments of ``pytest.mark.parametrize`` that run cases on every backend.

    ``slow``: those of the cases that are marked so.
    """
    params = []
    for device in DEVICES:
        for case in cases:
            marks = [pytest.mark.slow] if case in slow else []
            here = replace(case, device=device)
            params.append(pytest.param(here, marks=marks, id=here.id))
    return {"argnames": "case", "argvalues": params}


# ---- Inputs ---------------------------------------------------------------------------------


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
