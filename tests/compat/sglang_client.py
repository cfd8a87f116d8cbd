# SPDX-License-Identifier: Apache-2.0
"""SGLang's DeepEP dispatcher: its file and its base classes as installed, the server round it not.

Importing all of SGLang needs Triton and a model server's dependencies. Stand-ins answer for what
the file asks of it: settings, the parallel state, the recorder of expert loads, the FP8 kernel that
is not used here, and the number of multiprocessors of a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compat.dense import Experts, Problem, enter, run_layer

PACKAGES = ("", ".srt", ".srt.layers", ".srt.layers.moe", ".srt.layers.moe.token_dispatcher")


class DeepEPMode(Enum):
    """Which regime a batch goes through."""

    NORMAL = "normal"
    LOW_LATENCY = "low_latency"
    AUTO = "auto"

    def enable_normal(self) -> bool:
        return self is not DeepEPMode.LOW_LATENCY

    def enable_low_latency(self) -> bool:
        return self is not DeepEPMode.NORMAL

    def is_normal(self) -> bool:
        return self is DeepEPMode.NORMAL

    def is_low_latency(self) -> bool:
        return self is DeepEPMode.LOW_LATENCY

    def resolve(self, is_extend_in_batch: bool) -> DeepEPMode:
        return DeepEPMode.NORMAL if is_extend_in_batch else DeepEPMode.LOW_LATENCY


OutputDtype = Enum("OutputDtype", ["BF16", "FP8", "INT8", "NVFP4", "MXFP4", "MXFP8"])

HARDWARE: dict[str, Any] = {
    "get_bool_env_var": lambda _: False,
    "get_cuda_version": lambda: (12, 9),
    "is_blackwell": lambda: False,
    "is_flashinfer_available": lambda: False,
    "is_hip": lambda: False,
    "is_npu": lambda: False,
    "load_json_config": None,
}


class Server:
    """What the dispatcher asks of the server."""

    def __init__(self, max_tokens: int) -> None:
        self.is_prefill = True
        self.buffers: dict[str, Any] = {}
        self.counts: list[Any] = []
        self.max_tokens = max_tokens

    def modules(self) -> dict[str, dict[str, Any]]:
        """Return the stand-ins, by module and name."""
        return {**self._settings(), **self._layers(), "utils": HARDWARE}

    def _settings(self) -> dict[str, dict[str, Any]]:
        limit = SimpleNamespace(get=lambda: self.max_tokens)
        never = SimpleNamespace(get=lambda: False)
        recorder = SimpleNamespace(
            on_deepep_dispatch_normal=lambda counts, **_: self.counts.append(counts),
            on_deepep_dispatch_low_latency=self.counts.append,
        )
        envs = SimpleNamespace(
            SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=limit,
            SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE=never,
        )
        return {
            "environ": {"envs": envs},
            "eplb": {},
            "eplb.expert_distribution": {
                "get_global_expert_distribution_recorder": lambda: recorder
            },
            "runtime_context": {
                "get_parallel": lambda: None,
                "get_resources": lambda: SimpleNamespace(buffers=self.buffers),
            },
        }

    def _layers(self) -> dict[str, dict[str, Any]]:
        return {
            "layers.deep_gemm_wrapper": {
                "ENABLE_JIT_DEEPGEMM": True,
                "DEEPGEMM_BLACKWELL": False,
                "DEEPGEMM_SCALE_UE8M0": False,
            },
            "layers.dp_attention": {"get_is_extend_in_batch": lambda: self.is_prefill},
            "layers.moe.topk": {"TopKOutput": SimpleNamespace},
            "layers.moe.utils": {
                "DeepEPMode": DeepEPMode,
                "DispatcherOutputDtype": OutputDtype,
                "get_deepep_config": lambda: "",
                "get_deepep_output_dtype": lambda _: OutputDtype.BF16,
                "is_tbo_enabled": lambda: True,
            },
        }


def import_dispatcher(server: Server) -> Any:
    """Import the file, with stand-ins for the rest of SGLang."""
    root = importlib.util.find_spec("sglang")
    assert root is not None
    folder = Path(str(root.origin)).parent
    for package in PACKAGES:
        module = types.ModuleType(f"sglang{package}")
        module.__path__ = [str(folder.joinpath(*package.split(".")[1:]))]
        sys.modules[module.__name__] = module
    for name, contents in server.modules().items():
        module = types.ModuleType(f"sglang.srt.{name}")
        vars(module).update(contents)
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        setattr(sys.modules[parent], child, module)
    for name in ("kernels", "kernels.ops", "kernels.ops.quantization"):
        sys.modules[f"sglang.{name}"] = types.ModuleType(f"sglang.{name}")
    kernel = types.ModuleType("sglang.kernels.ops.quantization.fp8_kernel")
    kernel.sglang_per_token_group_quant_fp8 = None
    sys.modules[kernel.__name__] = kernel
    return importlib.import_module("sglang.srt.layers.moe.token_dispatcher.deepep")


def sglang(group: Any, problem: Problem) -> None:
    """Prefill and decode in turns through one dispatcher, without gradients."""
    rank = enter(group, problem)
    server = Server(problem.tokens)
    deepep = import_dispatcher(server)
    assert deepep.use_deepep, deepep._deepep_import_error
    if problem.device == "cpu":
        properties = SimpleNamespace(multi_processor_count=132)
        torch.cuda.get_device_properties = lambda **_: properties
    dispatcher = deepep.DeepEPDispatcher(
        group=group,
        router_topk=problem.topk,
        num_experts=problem.experts,
        num_local_experts=problem.num_local,
        hidden_size=problem.hidden,
        params_dtype=problem.dtype,
        deepep_mode=DeepEPMode.AUTO,
        async_finish=True,
        return_recv_hook=True,
    )

    def layer(
        x: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, experts: Experts
    ) -> torch.Tensor:
        routed = SimpleNamespace(topk_ids=ids, topk_weights=probs)
        received = dispatcher.dispatch(x, routed)
        y = torch.zeros_like(received.hidden_states)
        run = normal_experts if server.is_prefill else padded_experts
        run(received, experts, y)
        return dispatcher.combine((y, received.topk_ids, received.topk_weights))

    for is_prefill in (True, False, True, False):
        server.is_prefill = is_prefill
        run_layer(problem, rank, layer, backward=False)
    assert len(server.counts) == 4
    assert all(count % 128 == 0 for count in server.counts[0])


def normal_experts(received: Any, experts: Experts, y: torch.Tensor) -> None:
    """Sum the weighted experts of each row, as a contiguous grouped GEMM and a gather would."""
    for expert in range(len(experts.w1)):
        rows, column = (received.topk_ids == expert).nonzero(as_tuple=True)
        weighted = experts.one(expert, received.hidden_states[rows]).float()
        weighted *= received.topk_weights[rows, column, None]
        y.index_add_(0, rows, weighted.to(y.dtype))


def padded_experts(received: Any, experts: Experts, y: torch.Tensor) -> None:
    """Run each expert on the rows of its block, as a masked grouped GEMM would."""
    for expert, count in enumerate(received.masked_m.tolist()):
        y[expert, :count] = experts.one(expert, received.hidden_states[expert, :count])
