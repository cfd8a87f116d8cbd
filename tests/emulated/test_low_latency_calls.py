# SPDX-License-Identifier: Apache-2.0
"""What the host looks up instead of finding it out again, and makes only when it is looked at."""

from __future__ import annotations

import copy
import weakref
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from collective.case import Case
from emulated.low_latency import EmulatedBackend, LowLatencySession, play, use_small_blocks

from deepcomm import Handle, InvalidArgument, RecvLayout, ScaledTensor
from deepcomm.backends.cuda import low_latency_plan

pytestmark = pytest.mark.emulated_backend

SMALL = {"num_tokens": 5, "hidden": 256, "num_topk": 3, "experts_per_rank": 4}
ALONE = Case(**SMALL, num_ranks=1, layout=RecvLayout.EXPERT_PADDED, wire="fp8")
WRONG: dict[str, Any] = {
    "x": (lambda x: x[:, 1:], lambda x: x[None], lambda x: x.to_sparse(), lambda _: None),
    "topk_idx": (lambda ids: ids.float(), lambda ids: ids[1:], lambda _: 3),
    "topk_weights": (lambda weights: weights[:, 1:], lambda weights: weights.double()),
    "quantize": (lambda _: "int4", lambda _: []),
    "recv_layout": (lambda _: RecvLayout.EXPERT, lambda _: ["TOKEN"]),
    "on_timeout": (lambda _: "wait",),
    "out": (lambda _: torch.empty(3), lambda _: "there"),
    "wait_us_stats": (lambda _: torch.zeros(2, dtype=torch.int64),),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def arguments(session: LowLatencySession) -> dict[str, Any]:
    inputs, rank = session.inputs(0), session.rank
    return {
        "x": inputs.xs[rank],
        "topk_idx": inputs.ids[rank],
        "topk_weights": inputs.weights[rank],
        "quantize": "fp8_e4m3",
        "zero_padding": True,
    }


def test_calls_are_checked_although_one_like_them_was_right() -> None:
    def body(session: LowLatencySession) -> None:
        good, buffer = arguments(session), session.buffer
        got = [buffer.low_latency_dispatch(**good) for _ in range(2)][1]
        for name, changes in WRONG.items():
            for change in changes:
                with pytest.raises(InvalidArgument, match=f"{name}.*: expected"):
                    buffer.low_latency_dispatch(**{**good, name: change(good.get(name))})
        y = torch.zeros(got.x.shape, dtype=torch.bfloat16)
        for _ in range(2):
            assert not buffer.low_latency_combine(y, got.handle).x.any()
        for bad in (y[..., 1:], y.float(), None):
            with pytest.raises(InvalidArgument, match="y: expected"):
                buffer.low_latency_combine(bad, got.handle)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="handle: expected"):
            buffer.low_latency_combine(y, None)  # type: ignore[arg-type]
        scaled: Any = ScaledTensor(good["x"], None)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="expected"):
            buffer.low_latency_dispatch(**{**good, "x": scaled})

    play(ALONE, body)


def test_calls_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(session: LowLatencySession) -> None:
        good, buffer = arguments(session), session.buffer
        got = buffer.low_latency_dispatch(**good)
        y = torch.zeros(got.x.shape, dtype=torch.bfloat16)
        buffer.low_latency_combine(y, got.handle)
        for name in ("check_dispatch", "check_combine"):
            monkeypatch.setattr(low_latency_plan, name, None)
        again = buffer.low_latency_dispatch(**{**good, "x": good["x"].clone()}, return_hook=True)
        assert again.hook is not None
        again.hook()
        assert torch.equal(again.x.view(torch.uint8), got.x.view(torch.uint8))
        buffer.low_latency_combine(y.clone(), again.handle)
        # What has to be copied for the kernels is not like what need not be.
        with pytest.raises(TypeError):
            buffer.low_latency_dispatch(**{**good, "x": good["x"].T.contiguous().T})

    play(ALONE, body)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", [RecvLayout.EXPERT_PADDED, RecvLayout.TOKEN])
def test_calls_like_earlier_ones_are_repeated(
    monkeypatch: pytest.MonkeyPatch, layout: RecvLayout, wire: str
) -> None:
    """With other rows and other routing; results are those of the reference."""

    def body(session: LowLatencySession) -> None:
        session.low_latency_combine(session.low_latency_dispatch(0))
        counts = session.backend.low_latency.counts
        session.group.barrier()
        for name in ("low_latency_dispatch", "low_latency_combine"):
            monkeypatch.setattr(EmulatedBackend, name, None)
        for round_idx in range(1, 4):
            session.low_latency_combine(session.low_latency_dispatch(round_idx))
        assert (counts.num_dispatches, counts.num_combines) == (4, 4)
        assert counts.tokens_sent == 4 * len(session.inputs(0).xs[session.rank])

    play(Case(**SMALL, num_ranks=2, layout=layout, wire=wire, even=True), body)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_latency_plan, "MAX_PLANS", 2)

    def body(session: LowLatencySession) -> None:
        for num_tokens in (1, 2, 3, 1, 2, 3):
            some = {
                name: value[:num_tokens] if isinstance(value, torch.Tensor) else value
                for name, value in arguments(session).items()
            }
            got = session.buffer.low_latency_dispatch(**some)
            assert torch.equal(got.handle.topk_idx, some["topk_idx"].int())
            y = torch.zeros(got.x.shape, dtype=torch.bfloat16)
            assert session.buffer.low_latency_combine(y, got.handle).x.shape[0] == num_tokens
        context = session.backend.low_latency._open("test")
        assert len(context.dispatches) <= 2

    play(ALONE, body)


def test_handles_and_outputs_are_records_like_others() -> None:
    def body(session: LowLatencySession) -> None:
        output = session.buffer.low_latency_dispatch(**arguments(session))
        handle = output.handle
        assert repr(handle).startswith("PackedHandle(recv_layout=")
        for like in (copy.copy(handle), replace(handle)):
            assert all(getattr(like, f.name) is getattr(handle, f.name) for f in fields(Handle))
        for same in (copy.copy(output), replace(output, event=None)):
            assert same.num_recv_tokens is output.num_recv_tokens
            assert same.num_recv_tokens == same.num_tokens_per_expert.sum()
        with pytest.raises(FrozenInstanceError):
            handle.num_tokens = 1  # type: ignore[misc]
        with pytest.raises(AttributeError, match="tokens"):
            _ = handle.tokens  # type: ignore[attr-defined]

    play(ALONE, body)


def test_turn_of_a_hook_is_not_reused_before_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hook is called on another stream its kernel may read the turn late."""
    turns: list[weakref.ref[torch.Tensor]] = []
    make = low_latency_plan.CombinePlan.of

    def noted(context: Any, request: Any) -> Any:
        plan, inputs = make(context, request)

        def turn() -> torch.Tensor:
            made = plan.turn()
            turns.append(weakref.ref(made))
            return made

        return replace(plan, turn=turn), inputs

    monkeypatch.setattr(low_latency_plan.CombinePlan, "of", staticmethod(noted))

    def body(session: LowLatencySession) -> None:
        one = session.low_latency_dispatch(0)
        for num_calls in range(1, 10):
            session.low_latency_combine(one, return_hook=True).finish()
            kept = [turn() is not None for turn in turns]
            assert kept[-4:] == [True] * min(num_calls, 4)
            assert not any(kept[:-4])

    play(ALONE, body)
