# SPDX-License-Identifier: Apache-2.0
"""Clients from PyPI, unmodified, as the ranks of a group run them.

Each function gets a group and a problem, lets ``deep_ep`` mean the facades, runs the client's own
dispatch and combine round the experts of ``dense``, and compares. Replaced is only what has nothing
to do with either: see each function.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from compat.dense import Experts, Problem, enter, run_layer

if TYPE_CHECKING:
    from collections.abc import Callable


def megatron(group: Any, problem: Problem) -> None:
    """Megatron-Core's flex dispatcher and fused all-to-all, asynchronous as by default."""
    rank = enter(group, problem)
    from megatron.core.transformer.moe import fused_a2a
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    assert fused_a2a.HAVE_DEEP_EP
    assert not fused_a2a.HAVE_HYBRIDEP
    config = SimpleNamespace(
        moe_flex_dispatcher_backend="deepep",
        moe_router_topk=problem.topk,
        num_moe_experts=problem.experts,
        moe_router_dtype="fp32",
        moe_expert_capacity_factor=None,
        moe_permute_fusion=False,
        moe_deepep_num_sms=20,
        moe_router_padding_for_quantization=False,
    )
    alone = [dist.new_group([member]) for member in range(problem.num_ranks)][rank]
    groups = SimpleNamespace(ep=group, expt_tp=alone, tp_ep=group)
    local = range(rank * problem.num_local, (rank + 1) * problem.num_local)
    dispatcher = MoEFlexTokenDispatcher(problem.num_local, list(local), config, groups)

    def layer(
        x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        routing_map = torch.zeros(len(x), problem.experts, dtype=torch.bool, device=x.device)
        routing_map.scatter_(1, ids, value=True)
        dense = torch.zeros(routing_map.shape, device=x.device).scatter(1, ids, probs)
        rows, p = dispatcher.dispatch_preprocess(x.unsqueeze(1), routing_map, dense)
        rows, p = dispatcher.token_dispatch(rows, p)
        rows, counts, p = dispatcher.dispatch_postprocess(rows, p)
        y = (experts(rows, counts) * p.unsqueeze(-1)).to(x.dtype)
        y = dispatcher.combine_preprocess(y)
        y = dispatcher.token_combine(y)
        return dispatcher.combine_postprocess(y)

    for _ in range(2):
        run_layer(problem, rank, layer)


def automodel(group: Any, problem: Problem) -> None:
    """NeMo Automodel's flex dispatcher, synchronous and asynchronous, and its replay."""
    rank = enter(group, problem)
    from nemo_automodel.components.moe.megatron import fused_a2a
    from nemo_automodel.components.moe.megatron.token_dispatcher import (
        MoEFlexTokenDispatcher,
        TokenDispatcherConfig,
    )

    assert fused_a2a.HAVE_DEEP_EP
    local = list(range(rank * problem.num_local, (rank + 1) * problem.num_local))

    def layer_of(dispatcher: Any) -> Callable[..., torch.Tensor]:
        def layer(
            x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, experts: Experts
        ) -> torch.Tensor:
            rows, counts, p = dispatcher.token_permutation2(x, len(x), probs, ids)
            y = experts(rows, counts) * p.unsqueeze(-1)
            return dispatcher.token_unpermutation(y.to(x.dtype))

        return layer

    for is_async in (False, True):
        config = TokenDispatcherConfig(
            moe_router_topk=problem.topk,
            num_moe_experts=problem.experts,
            moe_share_token_dispatcher=False,
            moe_deepep_async_dispatch=is_async,
        )
        layer = layer_of(MoEFlexTokenDispatcher(problem.num_local, local, config, group))
        run_layer(problem, rank, layer)
        recorder = fused_a2a.DispatchReplayRecorder()
        for mode in ("record", "replay"):
            with fused_a2a.dispatch_replay_scope(recorder, mode):
                run_layer(problem, rank, layer)
        assert recorder.replay_misses == 0
    fused_a2a.free_buffer()


def torchtitan(group: Any, problem: Problem) -> None:
    """Torchtitan's DeepEP operators, registered for CUDA alone, here for CPUs as well."""
    rank = enter(group, problem)
    from torchtitan.distributed.deepep import deepep

    if problem.device == "cpu":
        torch.library.impl("deepep::dispatch", "CPU")(deepep._dispatch_op_impl)
        torch.library.impl("deepep::combine", "CPU")(deepep._combine_op_impl)
    sizes = {
        "hidden": problem.hidden,
        "num_max_tokens_per_rank": problem.tokens,
        "num_topk": problem.topk,
    }
    buffer = deepep.get_buffer(group, **sizes)
    assert deepep.get_buffer(group, **sizes) is buffer

    def layer(
        x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        rows, counts, state = deepep.dispatch_tokens(
            x,
            ids,
            probs,
            problem.num_local,
            problem.experts,
            num_tokens_per_rank=problem.tokens,
            cudagraphable=True,  # falls back to the compact layout where there are gradients
        )
        used = int(counts.sum())
        assert state.cudagraphable == (used < len(rows)) == (not torch.is_grad_enabled())
        y = torch.zeros_like(rows)
        y[:used] = experts(rows[:used], counts)
        out = deepep.combine_tokens(y, state)
        deepep.sync_combine()
        return out

    for _ in range(2):
        run_layer(problem, rank, layer)
    run_layer(problem, rank, layer, backward=False)
    assert deepep._handle_cache == {}


def deepspeed(group: Any, problem: Problem) -> None:
    """DeepSpeed AutoEP's route through its own grouped experts, with a checkpointed repetition.

    The exchange is made before the route asks for it, whose barrier names a CUDA device.
    """
    rank = enter(group, problem)
    from deepspeed.module_inject import auto_ep_comm, auto_ep_layer

    scope = auto_ep_comm.new_exchange_scope()
    sizes = (problem.experts, problem.topk, problem.hidden, problem.tokens)
    exchange = auto_ep_comm.shared_exchange(scope, group, *sizes)
    assert auto_ep_comm.shared_exchange(scope, group, *sizes) is exchange

    def layer_of(*, checkpoint: bool) -> Callable[..., torch.Tensor]:
        def layer(
            x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, experts: Experts
        ) -> torch.Tensor:
            owner = autoep_layer(problem, experts)
            owner._deepep_exchange = exchange
            owner._deepep_replay = auto_ep_comm.DeepEPCheckpointReplay()

            def route(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
                routed = SimpleNamespace(selected_experts=ids, top_scores=probs)
                return auto_ep_layer.AutoEPMoELayer._deepep_route(owner, x, routed)

            if not checkpoint:
                return route(x, probs)
            return torch.utils.checkpoint.checkpoint(route, x, probs, use_reentrant=False)

        return layer

    for checkpoint in (False, True):
        run_layer(problem, rank, layer_of(checkpoint=checkpoint))
    exchange.release()
    exchange.release()
    assert exchange.destroyed


def autoep_layer(problem: Problem, experts: Experts) -> SimpleNamespace:
    """Return what AutoEP's route reads of its layer, with DeepSpeed's own grouped experts."""
    from deepspeed.moe.ep_experts import GroupedExperts

    grouped = GroupedExperts(problem.hidden, problem.inner, problem.num_local, use_grouped_mm=False)
    grouped.w1, grouped.w2, grouped.w3 = experts.w1, experts.w2, experts.w3
    return SimpleNamespace(
        experts=grouped,
        num_local_experts=problem.num_local,
        row_weighting_impl="eager",
        score_apply="post",
    )
