# SPDX-License-Identifier: Apache-2.0
"""``deepcomm bench`` as a user starts it: real ranks, real buffers, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import deepcomm
from deepcomm.testing.routing import RoutingTrace, save_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE_PARENT = Path(deepcomm.__file__).parents[1]
TIMEOUT_S = 120
SMALL = ("--hidden=272", "--experts=12", "--topk=3", "--iters=2", "--warmup=1")
HIGH_THROUGHPUT = [
    "dispatch BF16",
    "dispatch FP8",
    "cached dispatch BF16",
    "combine BF16",
    "combine BF16 in place",
]
LOW_LATENCY = [
    f"{operation}{step}"
    for operation in ("dispatch BF16", "dispatch FP8", "combine BF16")
    for step in ("", " / send", " / hook")
]


def start(
    *arguments: str, launcher: Sequence[str] = (), program: Sequence[str] = ("-m", "deepcomm.cli")
) -> subprocess.CompletedProcess[str]:
    """Run ``deepcomm bench`` in a process of its own."""
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, *launcher, *program, "bench", *arguments],
        cwd=PACKAGE_PARENT,  # where -m looks first
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def measured(folder: Path, *arguments: str, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """Run a small benchmark that must succeed, and return its JSON."""
    path = folder / "bench.json"
    done = start(*SMALL, f"--json={path}", *arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "checked on all ranks" in done.stdout
    has_nodes = any(argument.startswith("--ranks-per-node") for argument in arguments)
    assert ("rail of rank 0: gloo" in done.stdout) == has_nodes
    return json.loads(path.read_text())


def operations(document: dict[str, Any]) -> list[str]:
    return [figure["operation"] for figure in document["results"][0]["figures"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ranks=1", "--tokens=5"),
        pytest.param(
            ("--ranks=2", "--tokens=33", "--recv-layout=expert", "--routing=zipf:1.2"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--ranks=3", "--tokens=16", "--recv-layout=expert_padded", "--routing=hot"),
            marks=pytest.mark.slow,
        ),
        ("--ranks=4", "--tokens=20", "--ranks-per-node=2"),
    ],
    ids=["ep1-token", "ep2-expert-zipf", "ep3-padded-hot", "ep4-two-nodes"],
)
def test_bench_checks_and_measures_high_throughput(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    document = measured(tmp_path, *arguments)
    assert operations(document) == HIGH_THROUGHPUT
    (result,) = document["results"]
    for figure in result["figures"]:
        assert figure["p99_us"] >= figure["p95_us"] >= figure["p50_us"] > 0
        assert len(result["timings"][figure["operation"]]["samples_us"]) == 2
        assert figure["speedup"] == figure["baseline_p50_us"] / figure["p50_us"]
        assert figure["memcpy_multiple"] > 0
        assert figure["deepep_gbps"] >= figure["wire_gbps"]
    counted = result["counters of one dispatch on rank 0"]
    assert counted["num_dispatches"] == 1
    assert counted["tokens_sent"] == result["tokens"]


@pytest.mark.parametrize("layout", ["expert_padded", "token"])
def test_bench_measures_low_latency_by_phase(tmp_path: Path, layout: str) -> None:
    arguments = ("--ranks=2", "--mode=low_latency", "--tokens=1,7", f"--recv-layout={layout}")
    document = measured(tmp_path, *arguments)
    assert [result["tokens"] for result in document["results"]] == [1, 7]
    assert operations(document) == LOW_LATENCY


def test_bench_counts_the_bytes_that_the_buffer_moves(tmp_path: Path) -> None:
    document = measured(tmp_path, "--ranks=2", "--tokens=16", "--routing=hot", "--baseline=none")
    (result,) = document["results"]
    assert result["traffic"] == {"rows": 32, "rows_remote": 16, "num_ranks": 2}
    counted = result["counters of one dispatch on rank 0"]
    assert counted["bytes_local"] >= 16 * document["row_bytes"]["dispatch BF16"]
    assert counted["bytes_node"] < 16 * document["row_bytes"]["dispatch BF16"]
    assert counted["bytes_network"] == 0
    assert result["figures"][0]["baseline_p50_us"] is None


def test_bench_replays_a_trace(tmp_path: Path) -> None:
    ids = torch.tensor([[0, 1], [2, -1], [3, 0]])
    save_trace(tmp_path / "t.npz", RoutingTrace.from_steps([[ids, ids + 0]], num_experts=4))
    trace = f"--routing=trace:{tmp_path / 't.npz'}"
    path = tmp_path / "out.json"
    done = start("--ranks=2", "--tokens=6", "--hidden=64", "--iters=1", trace, f"--json={path}")
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads(path.read_text())
    assert (document["axes"]["experts"], document["axes"]["topk"]) == (4, 2)
    # {0, 1} and {2} reach one rank each, {3, 0} both: 4 rows for 3 tokens, twice a rank.
    assert document["results"][0]["traffic"]["rows"] == 16


def test_bench_runs_as_ranks_of_torchrun(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    document = measured(tmp_path, "--tokens=8", launcher=launcher)
    assert document["axes"]["ranks"] == 2
    assert operations(document) == HIGH_THROUGHPUT


def test_bench_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    path = tmp_path / "bench.png"
    done = start(*SMALL, "--ranks=2", "--tokens=4", f"--plot={path}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert path.read_bytes().startswith(b"\x89PNG")


SABOTAGE = """
import os, signal, sys
import torch.distributed as dist
from deepcomm.buffer import Buffer
from deepcomm.cli import main

combine = Buffer.combine

def sabotaged(self, y, *arguments, **keywords):
    if dist.get_rank() == 1:
        {deed}
    return combine(self, y, *arguments, **keywords)

Buffer.combine = sabotaged
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("y = y * 1.5", "wrong result"),
        ("raise ZeroDivisionError('on purpose')", "ZeroDivisionError: on purpose"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 died of SIGKILL"),
    ],
    ids=["wrong", "raises", "killed"],
)
def test_bench_ends_with_a_message_when_a_rank_fails(
    tmp_path: Path, deed: str, message: str
) -> None:
    program = tmp_path / "sabotage.py"
    program.write_text(SABOTAGE.format(deed=deed))
    done = start(*SMALL, "--ranks=3", "--tokens=8", program=[str(program)])
    assert done.returncode == 1
    assert message in done.stderr
    assert "p50" not in done.stdout
