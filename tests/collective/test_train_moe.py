# SPDX-License-Identifier: Apache-2.0
"""The training example as users start it: losses, trace and plot, for any number of ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import deepcomm
from deepcomm.testing.routing import load_trace

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_moe.py"
PACKAGE_PARENT = Path(deepcomm.__file__).parents[1]
# 3 sequences: the shares of 2 ranks are uneven, and one of 4 ranks has no token at all.
SMALL = ("--batch=3", "--sequence=40", "--hidden=32", "--experts=8", "--topk=3", "--lr=0.01")
NUM_STEPS = 20


def start(num_ranks: int, *arguments: str) -> str:
    """Run the example, through torchrun unless ``num_ranks`` is 0; return what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, *(launcher if num_ranks else []), str(EXAMPLE), *arguments]
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train(folder: Path, num_ranks: int, *arguments: str) -> tuple[dict[str, Any], str]:
    """Train ``NUM_STEPS`` small steps; return the record of the run and its output."""
    path = folder / f"{num_ranks}.json"
    stdout = start(num_ranks, *SMALL, f"--steps={NUM_STEPS}", f"--json={path}", *arguments)
    return json.loads(path.read_text()), stdout


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_moe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("single")
    record, stdout = train(folder, 0, f"--record-routing={folder / 'routing.npz'}")
    assert f"step {NUM_STEPS - 1:5d}  loss {record['losses'][-1]:.4f}" in stdout
    return record | {"trace": load_trace(folder / "routing.npz")}


@pytest.mark.parametrize(
    ("num_ranks", "arguments"),
    [
        (1, ()),
        (2, ()),
        pytest.param(4, (), marks=pytest.mark.slow),
        pytest.param(4, ("--ranks-per-node=2",), marks=pytest.mark.slow),
        pytest.param(2, ("--layout=expert_padded",), marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_gives_the_same_losses(
    single: dict[str, Any],
    example: ModuleType,
    tmp_path: Path,
    num_ranks: int,
    arguments: tuple[str, ...],
) -> None:
    trace_path = tmp_path / "routing.npz"
    record, _ = train(tmp_path, num_ranks, f"--record-routing={trace_path}", *arguments)
    assert record["num_ranks"] == num_ranks
    assert len(record["losses"]) == NUM_STEPS <= example.LOSS_TOLERANCE_STEPS
    assert record["losses"] == pytest.approx(single["losses"], rel=example.LOSS_TOLERANCE)

    trace, want = load_trace(trace_path), single["trace"]
    assert (trace.num_steps, trace.num_ranks) == (2 * NUM_STEPS, num_ranks)
    assert trace.num_tokens.sum(axis=1).tolist() == [3 * 40] * 2 * NUM_STEPS
    # The first dispatch sees initial weights: not even roundings differ yet.
    first = slice(0, 3 * 40)
    assert (trace.topk_idx[first] == want.topk_idx[first]).all()


def test_losses_start_at_chance_and_fall(single: dict[str, Any], example: ModuleType) -> None:
    losses = torch.tensor(single["losses"])
    assert losses[0].item() == pytest.approx(torch.tensor(example.VOCABULARY).log().item(), abs=0.3)
    assert losses[-1] < losses[0] - 0.1


def test_another_seed_gives_other_losses(single: dict[str, Any], tmp_path: Path) -> None:
    record, _ = train(tmp_path, 0, "--seed=1", "--dtype=bfloat16")
    assert record["losses"] != pytest.approx(single["losses"], rel=1e-3)
    assert record["losses"][-1] < record["losses"][0] - 0.1


def test_loss_curve_is_a_png(example: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    settings = example.parse([f"--plot={path}", f"--json={tmp_path / 'loss.json'}"])
    example.save_results([5.5, 4.0, 3.5], 2, settings)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert json.loads((tmp_path / "loss.json").read_text())["losses"] == [5.5, 4.0, 3.5]


@pytest.mark.parametrize("with_rich", [True, False])
def test_report_works_with_and_without_rich(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    with_rich: bool,
) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    settings = example.parse(["--steps=3", "--print-every=2"])
    assert example.report(iter([3.0, 2.5, 2.25]), settings) == [3.0, 2.5, 2.25]
    printed = capsys.readouterr().out
    assert "step     0  loss 3.0000" in printed
    assert "step     1" not in printed
    assert "step     2  loss 2.2500" in printed


def test_shares_cover_the_same_batch(example: ModuleType) -> None:
    corpus = example.Corpus(example.parse(["--batch=5", "--sequence=16"]))
    whole = corpus.share(7, 0, 1)
    assert whole.shape == (5, 17)
    for num_ranks in (2, 4, 8):
        shares = [corpus.share(7, rank, num_ranks) for rank in range(num_ranks)]
        assert torch.equal(torch.cat(shares), whole)
    assert not torch.equal(corpus.share(8, 0, 1), whole)
