# SPDX-License-Identifier: Apache-2.0
"""What benchmarks say of the machine they ran on, what its links can do, and where results go."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deepcomm

COPY_BYTES = 256 << 20


def link_limits(num_repeats: int) -> dict[str, float]:
    """Return GB/s a direction of copies between the first two GPUs, both ways at once."""
    from gpu.launch import World
    from primitives import CopyField, bandwidth, time_variants

    limits = {"copy engines": copy_engine_gbps(num_repeats)}
    world = World.across_devices(2, 2 * COPY_BYTES + 4096)
    variants = [v for v in CopyField.make(world).variants() if v.name == "both ways"]
    chosen = [variant for variant in variants if variant.num_sms in (16, 32, 132)]
    time_variants(world, chosen, num_repeats)
    for variant in chosen:
        limits[f"bulk stores, {variant.num_sms} SMs"] = bandwidth(variant).p50
    return limits


def copy_engine_gbps(num_repeats: int) -> float:
    """Return the rate of the slower direction."""
    pairs = []
    for src, dst in ((0, 1), (1, 0)):
        source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{src}")
        target = torch.empty_like(source, device=f"cuda:{dst}")
        pairs.append((src, source, target, torch.cuda.Stream(src)))
    rates = []
    for _ in range(1 + num_repeats):
        spans = []
        for src, source, target, stream in pairs:
            with torch.cuda.device(src), torch.cuda.stream(stream):
                span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                target.copy_(source, non_blocking=True)  # a backlog: both are under way
                span[0].record()
                for _ in range(4):
                    target.copy_(source, non_blocking=True)
                span[1].record()
                spans.append(span)
        for src, *_ in pairs:
            torch.cuda.synchronize(src)
        slowest_ms = max(start.elapsed_time(end) for start, end in spans)
        rates.append(4 * COPY_BYTES / slowest_ms / 1e6)
    return float(np.percentile(rates[1:], 50))


def environment(commit: str) -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "gpus": "; ".join(gpus.strip().splitlines()),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "software": f"deepcomm {deepcomm.__version__}, torch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, NCCL {nccl}, Python {platform.python_version()}",
        "command": shlex.join(["python", *sys.argv]),
    }


def write_results(prefix: Path, content: dict[str, Any], lines: list[str]) -> None:
    """Write PREFIX.json and PREFIX.md."""
    prefix.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    prefix.with_suffix(".md").write_text("\n".join(lines))
