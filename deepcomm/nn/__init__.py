# SPDX-License-Identifier: Apache-2.0
"""Modules built on the differentiable operations."""

from deepcomm.nn.experts import Experts, SwiGLU, swiglu
from deepcomm.nn.gate import Gate, GateConfig, Routing
from deepcomm.nn.moe import ExpertParallelMoE, MoEConfig

__all__ = [
    "ExpertParallelMoE",
    "Experts",
    "Gate",
    "GateConfig",
    "MoEConfig",
    "Routing",
    "SwiGLU",
    "swiglu",
]
