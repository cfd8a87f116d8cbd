# SPDX-License-Identifier: Apache-2.0
"""``ExpertParallelMoE``: gate, dispatch, experts, combine and shared expert in one module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from deepcomm import functional
from deepcomm.errors import InvalidArgument
from deepcomm.nn.experts import Experts, SwiGLU
from deepcomm.nn.gate import Gate, Routing
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deepcomm.buffer import Buffer
    from deepcomm.nn.gate import GateConfig

__all__ = ["ExpertParallelMoE", "MoEConfig"]


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Shape of an MoE layer.

    Attributes:
        gate: The router; its experts must be those of the buffer.
        hidden: H, that of the buffer.
        intermediate: I of each routed expert.
        shared_intermediate: I of the shared expert, 0 for none.
        recv_layout: ``EXPERT``, or ``EXPERT_PADDED`` (static shapes, more memory).
        seed: Of the routed experts' weights, whatever the number of ranks.
    """

    gate: GateConfig
    hidden: int
    intermediate: int
    shared_intermediate: int = 0
    recv_layout: RecvLayout = RecvLayout.EXPERT
    seed: int = 0


class ExpertParallelMoE(nn.Module):
    """An MoE layer whose experts are spread over the ranks of a buffer.

    Forward and backward are collective: all ranks run both, also with no token. Where the loss is a
    sum over the tokens of all ranks, the gradients of the routed experts are complete on their
    owner; those of the gate and the shared expert are partial sums, to be reduced over the ranks
    like any replicated parameter's.

    Layers that run one after another may share a buffer.
    """

    def __init__(self, buffer: Buffer, config: MoEConfig) -> None:
        """Create the replicated part from the default generator, the experts from ``config.seed``.

        Args:
            buffer: Exchanges the tokens; not a part of the state and not closed by the module.
            config: Shape of the layer.

        Raises:
            InvalidArgument: ``config`` does not fit the buffer, or asks for the layout ``TOKEN``.
        """
        super().__init__()
        _check(buffer, config)
        self.buffer = buffer
        self.config = config
        self.gate = Gate(config.gate, config.hidden)
        num_local_experts = config.gate.num_experts // buffer.num_ranks
        first = buffer.rank * num_local_experts
        self.experts = Experts(
            range(first, first + num_local_experts),
            config.hidden,
            config.intermediate,
            config.seed,
        )
        self.shared = (
            SwiGLU(config.hidden, config.shared_intermediate)
            if config.shared_intermediate
            else None
        )
        self.last_routing: Routing | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., H] from [..., H], at most ``max_tokens_per_rank`` tokens.

        The routing of the call stays in ``last_routing``, detached, for traces and statistics.
        """
        tokens = x.reshape(-1, self.config.hidden)
        routing = self.gate(tokens)
        self.last_routing = Routing(routing.topk_idx, routing.topk_weights.detach())
        received = functional.dispatch(
            self.buffer,
            tokens,
            routing.topk_idx,
            routing.topk_weights,
            recv_layout=self.config.recv_layout,
        )
        output = functional.combine(
            self.buffer,
            self.experts(received),
            received.handle,
            row_weights=received.topk_weights,
            bias=None if self.shared is None else self.shared(tokens),
        )
        return output.x.view(x.shape)

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that exist on this rank only and need no reduction."""
        return self.experts.parameters()


def _check(buffer: Buffer, config: MoEConfig) -> None:
    """Raise InvalidArgument for the first field of ``config`` that does not fit ``buffer``."""
    for name, expected, got in (
        ("num_experts", buffer.config.num_experts, config.gate.num_experts),
        ("hidden", buffer.config.hidden, config.hidden),
    ):
        if expected != got:
            raise InvalidArgument(f"{name}: expected {expected} as in the buffer, got {got}")
    if config.gate.num_topk > buffer.config.num_topk:
        raise InvalidArgument(
            f"num_topk: expected at most {buffer.config.num_topk} as in the buffer, "
            f"got {config.gate.num_topk}"
        )
    if config.recv_layout is RecvLayout.TOKEN:
        raise InvalidArgument("recv_layout: expected EXPERT or EXPERT_PADDED, got TOKEN")
