# SPDX-License-Identifier: Apache-2.0
"""Expert networks: SwiGLU, the local experts of a rank as stacked weights."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deepcomm.types import DispatchOutput

__all__ = ["Experts", "SwiGLU", "swiglu"]


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return down (silu(gate x) * up x), [..., H].

    Args:
        x: [..., H].
        gate_up: [2 I, H], the gate's rows and then those of the up projection.
        down: [H, I].
    """
    gate, up = functional.linear(x, gate_up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down)


class SwiGLU(nn.Module):
    """One SwiGLU network that every token visits: the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Draw the weights from the default generator.

        Args:
            hidden: H.
            intermediate: I.
        """
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2 * intermediate, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(hidden, intermediate) * intermediate**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., H] from [..., H]."""
        return swiglu(x, self.gate_up, self.down)


class Experts(nn.Module):
    """The experts that this rank owns.

    Attributes:
        gate_up: [L, 2 I, H].
        down: [L, H, I].
    """

    def __init__(
        self, expert_ids: Iterable[int], hidden: int, intermediate: int, seed: int
    ) -> None:
        """Draw each expert's weights from a generator of its own, whichever rank it lives on.

        Args:
            expert_ids: Global ids of the local experts, ascending.
            hidden: H.
            intermediate: I.
            seed: Of all experts.
        """
        super().__init__()
        gate_up, down = [], []
        for expert_id in expert_ids:
            generator = torch.Generator().manual_seed(_expert_seed(seed, expert_id))
            gate_up.append(torch.randn(2 * intermediate, hidden, generator=generator))
            down.append(torch.randn(hidden, intermediate, generator=generator))
        self.gate_up = nn.Parameter(torch.stack(gate_up) * hidden**-0.5)
        self.down = nn.Parameter(torch.stack(down) * intermediate**-0.5)

    def forward(self, received: DispatchOutput) -> torch.Tensor:
        """Run each expert over its rows; return y in the shape and the rows of ``received.x``.

        Args:
            received: In ``EXPERT`` or ``EXPERT_PADDED``.
        """
        if received.x.dim() == 3:
            return self._blocks(received.x)
        if received.expert_offsets is None:
            raise InvalidArgument("recv_layout: expected EXPERT or EXPERT_PADDED, got TOKEN")
        return self._groups(received.x, received.expert_offsets.tolist())

    def _blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Run padded blocks [L, M, H]; no row count is needed, so the host waits for nothing."""
        gate, up = torch.bmm(x, self.gate_up.mT).chunk(2, dim=-1)
        return torch.bmm(functional.silu(gate) * up, self.down.mT)

    def _groups(self, x: torch.Tensor, offsets: list[int]) -> torch.Tensor:
        """Run groups of rows [N, H]; rows after the last group give zeros.

        Empty groups run too: their weights get a gradient of zero, and a rank without any row keeps
        its place in the graph.
        """
        sizes = [end - start for start, end in itertools.pairwise(offsets)]
        *groups, rest = torch.split(x, [*sizes, x.shape[0] - offsets[-1]])
        weights = zip(groups, self.gate_up.unbind(), self.down.unbind(), strict=True)
        return torch.cat([*(swiglu(*group) for group in weights), torch.zeros_like(rest)])


def _expert_seed(seed: int, expert_id: int) -> int:
    """Return a seed unrelated to that of any other (seed, expert)."""
    digest = hashlib.sha256(f"{seed}/{expert_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
