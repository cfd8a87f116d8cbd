# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments on one rank, by operation: the tables of ``test_bad_arguments``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from trap.rounds import EXPERTS_PER_RANK, HIDDEN, MAX_TOKENS, NUM_TOPK, OPERATIONS

from deepcomm import RecvLayout, ScaledTensor

if TYPE_CHECKING:
    from collections.abc import Callable

    Arguments = dict[str, Any]
    Change = Callable[[Arguments], Arguments]

DISPATCHES = ("dispatch", "low_latency_dispatch")
COMBINES = ("combine", "low_latency_combine")
TOO_MANY = MAX_TOKENS + 1
WEIGHTS = "topk_weights"


@dataclass(frozen=True)
class Case:
    """One wrong argument: ``change`` of the valid ones gives those to replace, on one rank."""

    name: str
    names_argument: str
    change: Change
    operations: tuple[str, ...] = OPERATIONS


def rows(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **{"dtype": torch.bfloat16, **options})


def given(**change: Any) -> Change:
    return lambda _arguments: change


def changed(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda arguments: {name: change(arguments[name])}


def first_ids(*ids: int) -> Change:
    def change(topk_idx: torch.Tensor) -> torch.Tensor:
        topk_idx[0] = torch.tensor(ids)
        return topk_idx

    return changed("topk_idx", change)


def scaled(num_scales: int, **options: Any) -> Change:
    def change(arguments: Arguments) -> Arguments:
        data = arguments["x"].to(torch.float8_e4m3fn)
        return {"x": ScaledTensor(data, torch.ones(len(data), num_scales)), **options}

    return change


def too_many_tokens(_arguments: Arguments) -> Arguments:
    topk_idx = torch.full((TOO_MANY, NUM_TOPK), -1)
    weights = torch.ones(TOO_MANY, NUM_TOPK)
    return {"x": rows(TOO_MANY, HIDDEN), "topk_idx": topk_idx, "topk_weights": weights}


def of_shape(name: str, like: str, shape: Callable[[int], tuple[int, ...]]) -> Change:
    """Replace ``name`` by zeros whose shape follows from the length of ``like``."""
    return lambda arguments: {name: rows(*shape(len(arguments[like])))}


DISPATCH_CASES = (
    Case("x-none", "x", given(x=None), DISPATCHES),
    Case("x-list", "x", given(x=[[0.0]]), DISPATCHES),
    Case("x-float64", "x", changed("x", torch.Tensor.double), DISPATCHES),
    Case("x-hidden", "x", of_shape("x", "x", lambda t: (t, HIDDEN + 8)), DISPATCHES),
    Case("x-1d", "x", given(x=rows(HIDDEN)), DISPATCHES),
    Case("x-meta", "x", changed("x", lambda x: x.to("meta")), DISPATCHES),
    Case("x-sparse", "x", changed("x", torch.Tensor.to_sparse), DISPATCHES),
    Case("x-too-many-tokens", "max_tokens_per_rank", too_many_tokens, DISPATCHES),
    Case("scales-columns", "x.scales", scaled(3), DISPATCHES),
    Case("scales-format", "scale_format", scaled(1, scale_format="ue8m0"), DISPATCHES),
    Case("scaled-quantize", "quantize", scaled(1, quantize="fp8_e4m3"), DISPATCHES),
    Case("quantize", "quantize", given(quantize="int8"), DISPATCHES),
    Case("ids-none", "topk_idx", given(topk_idx=None), DISPATCHES),
    Case("ids-list", "topk_idx", given(topk_idx=[[0]]), DISPATCHES),
    Case("ids-float", "topk_idx", changed("topk_idx", torch.Tensor.float), DISPATCHES),
    Case("ids-int16", "topk_idx", changed("topk_idx", torch.Tensor.short), DISPATCHES),
    Case("ids-tokens", "topk_idx", changed("topk_idx", lambda ids: ids[1:]), DISPATCHES),
    Case("ids-1d", "topk_idx", changed("topk_idx", lambda ids: ids[:, 0]), DISPATCHES),
    Case("ids-topk", "topk_idx", changed("topk_idx", lambda ids: ids.repeat(1, 2)), DISPATCHES),
    Case("ids-meta", "topk_idx", changed("topk_idx", lambda ids: ids.to("meta")), DISPATCHES),
    Case("ids-too-large", "topk_idx", first_ids(0, 10**6, 1, 2), DISPATCHES),
    Case("ids-beyond-int32", "topk_idx", first_ids(0, 2**32 + 1, 2, 3), DISPATCHES),
    Case("ids-negative", "topk_idx", first_ids(0, -2, 1, 2), DISPATCHES),
    Case("ids-twice", "topk_idx", first_ids(0, 1, -1, 0), DISPATCHES),
    Case(
        "weights-double", "topk_weights", changed("topk_weights", torch.Tensor.double), DISPATCHES
    ),
    Case("weights-shape", "topk_weights", changed("topk_weights", lambda w: w[:, 1:]), DISPATCHES),
    Case(
        "weights-meta", "topk_weights", changed("topk_weights", lambda w: w.to("meta")), DISPATCHES
    ),
    Case("layout-name", "recv_layout", given(recv_layout="token"), DISPATCHES),
    Case("out-hidden", "out", given(out=rows(4, HIDDEN + 8)), DISPATCHES),
    Case("out-strides", "out", given(out=rows(999, 2 * HIDDEN)[:, ::2]), DISPATCHES),
    Case("out-meta", "out", given(out=rows(999, HIDDEN, device="meta")), DISPATCHES),
    Case("alignment-zero", "expert_alignment", given(expert_alignment=0), ("dispatch",)),
    Case("alignment-token", "expert_alignment", given(expert_alignment=8), ("dispatch",)),
    Case("capacity-negative", "num_recv_tokens", given(num_recv_tokens=-1), ("dispatch",)),
    Case(
        "capacity-padded",
        "num_recv_tokens",
        given(num_recv_tokens=9, recv_layout=RecvLayout.EXPERT_PADDED),
        ("dispatch",),
    ),
    Case("handle-and-ids", "topk_idx", lambda a: {"handle": a["handles"][0]}, ("dispatch",)),
    Case("handle-of-other-mode", "handle", lambda a: {"handle": a["handles"][1]}, ("dispatch",)),
    Case("handle-type", "handle", given(handle=7, topk_idx=None), ("dispatch",)),
    Case("layout-expert", "recv_layout", given(recv_layout=RecvLayout.EXPERT), DISPATCHES[1:]),
    Case("out-rows", "out", given(out=rows(4, HIDDEN)), DISPATCHES[1:]),
    Case("on-timeout", "on_timeout", given(on_timeout="ignore"), DISPATCHES[1:]),
    Case(
        "stats-length",
        "expert_token_stats",
        given(expert_token_stats=torch.zeros(EXPERTS_PER_RANK + 1, dtype=torch.int32)),
        DISPATCHES[1:],
    ),
    Case(
        "stats-dtype",
        "expert_token_stats",
        given(expert_token_stats=torch.zeros(EXPERTS_PER_RANK)),
        DISPATCHES[1:],
    ),
)

COMBINE_CASES = (
    Case("y-none", "y", given(y=None), COMBINES),
    Case("y-float64", "y", changed("y", torch.Tensor.double), COMBINES),
    Case("y-rows", "y", changed("y", lambda y: y[1:]), COMBINES),
    Case("y-hidden", "y", changed("y", lambda y: y[..., :8]), COMBINES),
    Case("y-meta", "y", changed("y", lambda y: y.to("meta")), COMBINES),
    Case("handle-none", "handle", given(handle=None), COMBINES),
    Case("handle-of-ll", "handle", lambda a: {"handle": a["handles"][1]}, COMBINES[:1]),
    Case("handle-of-ht", "handle", lambda a: {"handle": a["handles"][0]}, COMBINES[1:]),
    Case("weights-shape", "topk_weights", given(topk_weights=torch.ones(3, 3)), COMBINES),
    Case("weights-double", "topk_weights", given(topk_weights=torch.ones(3, 3).double()), COMBINES),
    Case("bias-shape", "bias", given(bias=rows(3, HIDDEN)), COMBINES),
    Case("bias-meta", "bias", given(bias=rows(3, HIDDEN, device="meta")), COMBINES),
    Case("out-shape", "out", given(out=rows(3, HIDDEN)), COMBINES),
    Case(
        "out-strides",
        "out",
        lambda a: {"out": rows(a["handle"].num_tokens, 2 * HIDDEN)[:, ::2]},
        COMBINES,
    ),
    Case("apply-token", "apply_weights", given(apply_weights=True), ("combine",)),
    Case("on-timeout", "on_timeout", given(on_timeout="ignore"), COMBINES[1:]),
    Case("stats-length", "wait_us_stats", given(wait_us_stats=torch.zeros(9).long()), COMBINES[1:]),
)

ALL = [
    (operation, case) for case in (*DISPATCH_CASES, *COMBINE_CASES) for operation in case.operations
]


def ident(operation: str, case: Case) -> str:
    return f"{operation}-{case.name}"
