# SPDX-License-Identifier: Apache-2.0
"""``deepcomm bench`` without a buffer: its checks against the reference, its clock and figures."""

from __future__ import annotations

import argparse
import json
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

from deepcomm import reference
from deepcomm.cli.bench import args
from deepcomm.cli.bench.baseline import TorchExchange
from deepcomm.cli.bench.figures import Contenders, Result, Traffic, make_figures
from deepcomm.cli.bench.measure import Limits, Timing, measure
from deepcomm.cli.bench.operations import Kind, Operation
from deepcomm.cli.bench.opponents import list_copies
from deepcomm.cli.bench.plot import write_plot
from deepcomm.cli.bench.report import print_results, write_json
from deepcomm.cli.bench.verify import (
    Mismatch,
    check_combine,
    check_dispatch,
    check_rows,
    expert_output_,
)
from deepcomm.cli.bench.workload import Payload, Workload
from deepcomm.types import BufferStats, RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deepcomm.types import DispatchOutput

ONE_NODE = "backend    cpu\nrail       none: one node\ntimeout    9 s"
SMALL = ["--ranks", "3", "--tokens", "40", "--hidden", "272", "--experts", "12", "--topk", "4"]
CPU = torch.device("cpu")


def config_of(*arguments: str) -> args.BenchConfig:
    parser = argparse.ArgumentParser()
    args.add_parser(parser.add_subparsers())
    return args.make_config(parser.parse_args(["bench", *arguments]), ["bench", *arguments])


# Workload and checks, against the reference


def reference_outputs(
    config: args.BenchConfig, quantize: str | None = None
) -> tuple[list[Workload], list[DispatchOutput]]:
    num_tokens = config.tokens[0]
    workloads = [Workload(config, rank, num_tokens, CPU) for rank in range(config.ranks)]
    outputs = reference.dispatch(
        [workload.x for workload in workloads],
        [workload.routed.topk_idx for workload in workloads],
        [workload.routed.topk_weights for workload in workloads],
        config=reference.ReferenceConfig(
            num_experts=config.experts,
            num_ranks=config.ranks,
            ranks_per_node=config.ranks_per_node or config.ranks,
            max_tokens_per_rank=num_tokens,
        ),
        recv_layout=config.recv_layout,
        quantize=quantize,
    )
    return workloads, outputs


def test_payload_rows_differ_and_can_be_made_again() -> None:
    payload = Payload(hidden=8, seed=1)
    source = torch.arange(3).repeat_interleave(5000)
    token = torch.arange(5000).repeat(3)
    rows = payload.rows(source, token)
    assert len(rows.view(torch.int16).unique(dim=0)) == len(rows)
    assert torch.equal(rows[7000:7003], Payload(8, 1).rows(source[7000:7003], token[7000:7003]))
    assert not torch.equal(rows, Payload(8, 2).rows(source, token))


@pytest.mark.parametrize("layout", list(RecvLayout))
@pytest.mark.parametrize("quantize", [None, "fp8_e4m3"])
@pytest.mark.parametrize("routing", ["uniform", "hot"])
def test_checks_accept_what_the_reference_delivers(
    layout: RecvLayout, quantize: str | None, routing: str
) -> None:
    config = config_of(*SMALL, "--recv-layout", layout.value, "--routing", routing)
    for workload, output in zip(*reference_outputs(config, quantize), strict=True):
        check_dispatch(workload, output)


def _swap_rows(output: DispatchOutput) -> DispatchOutput:
    x = output.x.clone()
    x[[1, 2]] = x[[2, 1]]
    return replace(output, x=x)


def _flip_last_element(output: DispatchOutput) -> DispatchOutput:
    x = output.x.clone()
    x.view(torch.int16)[-1, -1] ^= 1
    return replace(output, x=x)


def _change_weight(output: DispatchOutput) -> DispatchOutput:
    assert output.topk_weights is not None
    return replace(output, topk_weights=output.topk_weights * (1 + 2**-23))


def _change_id(output: DispatchOutput) -> DispatchOutput:
    assert output.topk_idx is not None
    return replace(output, topk_idx=output.topk_idx.clamp(min=0))


def _change_count(output: DispatchOutput) -> DispatchOutput:
    return replace(output, num_tokens_per_expert=output.num_tokens_per_expert.roll(1) + 1)


@pytest.mark.parametrize(
    "corrupt", [_swap_rows, _flip_last_element, _change_weight, _change_id, _change_count]
)
def test_checks_notice_a_wrong_dispatch(
    corrupt: Callable[[DispatchOutput], DispatchOutput],
) -> None:
    workloads, outputs = reference_outputs(config_of(*SMALL))
    with pytest.raises(Mismatch, match="expected"):
        check_dispatch(workloads[1], corrupt(outputs[1]))


def test_checks_notice_a_wrong_scale() -> None:
    workloads, outputs = reference_outputs(config_of(*SMALL), "fp8_e4m3")
    scales = outputs[0].scales
    assert scales is not None
    scales[3, 1] *= 1 + 2**-23
    with pytest.raises(Mismatch, match=r"scales: 1 of .* first at \(3, 1\)"):
        check_dispatch(workloads[0], outputs[0])


def _combined(
    config: args.BenchConfig, wrong_rank: int | None = None
) -> tuple[Workload, torch.Tensor]:
    """Return rank 0's workload and what the reference combines, a row of one rank being lost."""
    workloads, outputs = reference_outputs(config)
    ys = []
    for workload, output in zip(workloads, outputs, strict=True):
        ys.append(expert_output_(output.x.clone(), workload.rank))
    if wrong_rank is not None:
        ys[wrong_rank][0] = 0
    weighted = config.recv_layout is not RecvLayout.TOKEN
    handles = [output.handle for output in outputs]
    return workloads[0], reference.combine(ys, handles, apply_weights=weighted)[0].x


@pytest.mark.parametrize("layout", list(RecvLayout))
@pytest.mark.parametrize("nodes", [[], ["--ranks-per-node", "1"]], ids=["one-node", "three-nodes"])
def test_checks_accept_what_the_reference_combines(layout: RecvLayout, nodes: list[str]) -> None:
    config = config_of(*SMALL, "--recv-layout", layout.value, *nodes)
    workload, got = _combined(config)
    check_combine(workload, got, weighted=layout is not RecvLayout.TOKEN, num_roundings=4)


def test_checks_notice_a_row_lost_in_combine() -> None:
    workload, got = _combined(config_of(*SMALL), wrong_rank=2)
    with pytest.raises(Mismatch, match=r"token \d+, element"):
        check_combine(workload, got, weighted=False, num_roundings=4)


def test_checks_notice_a_nan_in_combine() -> None:
    workload, got = _combined(config_of(*SMALL))
    got[5, 7] = float("nan")
    with pytest.raises(Mismatch, match=r"token 5, element 7: .* got nan"):
        check_combine(workload, got, weighted=False, num_roundings=4)


# Measuring and reporting


@pytest.fixture
def single_rank_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def _operation(name: str, kind: Kind, log: list[str], *steps: str) -> Operation:
    def step(label: str) -> Callable[[object], str]:
        def call(previous: object) -> str:
            log.append(f"{name}:{label}<{previous}")
            return label

        return call

    return Operation(name, kind, tuple((label, step(label)) for label in steps), lambda _: None)


@pytest.mark.usefixtures("single_rank_group")
def test_measure_rotates_the_order_and_hands_results_from_step_to_step() -> None:
    log: list[str] = []
    operations = [
        _operation("a", Kind.DISPATCH, log, "send", "hook"),
        _operation("b", Kind.COMBINE, log, "call"),
    ]
    timings = measure(operations, Limits(warmup=1, iters=2, max_seconds=60.0), CPU, None)
    a, b = ["a:send<None", "a:hook<send"], ["b:call<None"]
    assert log == [*b, *a, *a, *b, *b, *a]
    assert list(timings) == ["a", "a / send", "a / hook", "b"]
    for timing in timings.values():
        assert len(timing.samples_us) == 2
        assert min(timing.samples_us) > 0
    parts = zip(timings["a / send"].samples_us, timings["a / hook"].samples_us, strict=True)
    assert [sum(pair) for pair in parts] == pytest.approx(list(timings["a"].samples_us))


@pytest.mark.usefixtures("single_rank_group")
def test_measure_divides_by_the_repeats_of_a_call() -> None:
    steps = (("call", lambda _: time.sleep(0.01)),)
    once = Operation("once", Kind.DISPATCH, steps, lambda _: None)
    often = Operation("often", Kind.DISPATCH, steps, lambda _: None, repeats=1000)
    timings = measure([once, often], Limits(warmup=1, iters=3, max_seconds=60.0), CPU, None)
    assert min(timings["once"].samples_us) > 10_000
    assert max(timings["often"].samples_us) < min(timings["once"].samples_us)


def test_copies_of_many_bytes_repeat_until_they_last() -> None:
    config = config_of("--ranks", "2", "--hidden", "8192", "--experts", "4", "--topk", "2")
    (copy, *_) = list_copies(Workload(config, 0, 1000, CPU))
    arriving = int(Workload(config, 0, 1000, CPU).rows_between.sum(0).max()) * 16384
    assert copy.repeats * arriving >= 128 << 20 > (copy.repeats - 1) * arriving


@pytest.mark.parametrize(("rank", "arriving"), [(0, 120), (1, 0)])
def test_copies_move_what_each_kind_receives(rank: int, arriving: int) -> None:
    config = config_of(*SMALL, "--routing", "hot")
    copies = {copy.kind: copy for copy in list_copies(Workload(config, rank, 40, CPU))}
    targets = {kind: copy.steps[0][1].__defaults__[0].args[0] for kind, copy in copies.items()}
    assert len(targets[Kind.DISPATCH]) == arriving * 544
    assert len(targets[Kind.DISPATCH_FP8]) == arriving * (272 + 3 * 4)
    assert len(targets[Kind.COMBINE]) == 40 * 544
    assert copies[Kind.COMBINE].repeats == 1000
    for kind, copy in copies.items():
        copy.run()
        assert targets[kind].all()


@pytest.mark.usefixtures("single_rank_group")
def test_measure_stops_after_its_seconds_but_not_before_a_sample() -> None:
    operation = _operation("a", Kind.DISPATCH, [], "call")
    timings = measure([operation], Limits(warmup=2, iters=1000, max_seconds=0.0), CPU, None)
    assert len(timings["a"].samples_us) == 1


@pytest.mark.usefixtures("single_rank_group")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_baseline_of_one_rank_is_right(num_tokens: int, kept: bool) -> None:
    config = config_of("--ranks", "1", "--hidden", "272", "--experts", "4", "--topk", "2")
    workload = Workload(config, 0, num_tokens, CPU)
    group = dist.group.WORLD
    assert group is not None
    exchange = TorchExchange(group, config.experts, keep_tensors=kept)
    plan = exchange.route(workload.routed.topk_idx)
    expected = workload.arrivals_in(RecvLayout.TOKEN)
    rows = exchange.dispatch(workload.x, workload.routed, plan)
    check_rows(workload, expected, rows, None)
    cast = exchange.dispatch_fp8(workload.x, workload.routed, plan)
    check_rows(workload, expected, cast.data, cast.scales)
    ids, weights = exchange.exchange_routing(workload.routed, plan)
    assert ids.equal(workload.routed.topk_idx[plan.token].int())
    assert weights.equal(workload.routed.topk_weights[plan.token])
    summed = exchange.combine(expert_output_(rows.clone(), 0), plan, num_tokens)
    check_combine(workload, summed, weighted=False, num_roundings=2)


@pytest.mark.usefixtures("single_rank_group")
def test_baseline_skips_what_has_no_expert() -> None:
    group = dist.group.WORLD
    assert group is not None
    plan = TorchExchange(group, 4).route(torch.tensor([[-1, 3], [-1, -1], [0, 1]]))
    assert plan.token.tolist() == [0, 2]
    assert plan.send_rows == plan.recv_rows == [2]


def _results(config: args.BenchConfig, explanation: str = ONE_NODE) -> list[Result]:
    """Make results of made-up times: 10 rows of 2 ranks, of which 4 cross; 100 us each."""
    ours = [
        _operation("dispatch BF16", Kind.DISPATCH, [], "send", "hook"),
        _operation("dispatch FP8", Kind.DISPATCH_FP8, [], "call"),
    ]
    rivals = [_operation("gloo dispatch BF16", Kind.DISPATCH, [], "call")]
    kinds = (Kind.DISPATCH, Kind.DISPATCH_FP8)
    copies = [_operation(f"memcpy {kind.value}", kind, [], "call") for kind in kinds]
    times = {
        "dispatch BF16": Timing((90.0, 100.0, 110.0)),
        "dispatch BF16 / send": Timing((30.0, 30.0, 30.0)),
        "dispatch BF16 / hook": Timing((70.0, 70.0, 70.0)),
        "dispatch FP8": Timing((50.0,) * 3),
        "gloo dispatch BF16": Timing((250.0,) * 3),
        "memcpy dispatch BF16": Timing((80.0,) * 3),
        "memcpy dispatch FP8": Timing((40.0,) * 3),
    }
    traffic = Traffic(rows=10, rows_remote=4, num_ranks=2)
    figures = make_figures(Contenders(ours, rivals, copies), times, traffic, config.hidden)
    counters = BufferStats(1, 0, 8, 5, 6, 4, 2_500_000, (0, 1))
    return [
        Result(tokens, traffic, figures, times, counters, explanation) for tokens in config.tokens
    ]


def test_figures_follow_their_formula() -> None:
    config = config_of("--ranks", "2", "--hidden", "1280", "--tokens", "4")
    bf16, send, hook, fp8 = _results(config)[0].figures
    # 4 rows of 2560 bytes cross, over 2 ranks: 5120 bytes in 100 us are 0.0512 GB/s.
    assert bf16.wire_gbps == pytest.approx(0.0512)
    assert bf16.deepep_gbps == pytest.approx(0.128)
    assert bf16.speedup == pytest.approx(2.5)
    assert bf16.memcpy_multiple == pytest.approx(1.25)
    assert (send.operation, hook.operation) == ("dispatch BF16 / send", "dispatch BF16 / hook")
    assert send.speedup is None
    # 1280 elements and 10 scales of 4 bytes: 1320 bytes a row.
    assert fp8.wire_gbps == pytest.approx(4 * 1320 / 2 / 50e-6 / 1e9)
    assert fp8.speedup is None


def test_timing_gives_percentiles() -> None:
    timing = Timing(tuple(float(value) for value in range(101)))
    assert (timing.p50_us, timing.p95_us, timing.p99_us) == (50.0, 95.0, 99.0)


def test_traffic_counts_rows_once_a_rank() -> None:
    config = config_of(*SMALL, "--routing", "hot")  # experts 0..3 are all of rank 0's
    traffic = Traffic.of(Workload(config, 1, 40, CPU))
    assert (traffic.rows, traffic.rows_remote, traffic.num_ranks) == (120, 80, 3)


def test_table_has_a_line_for_each_figure(capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of("--ranks", "2", "--tokens", "4,8")
    print_results(config, _results(config))
    lines = capfd.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["operation", "tokens", "p50", "p95"]
    assert lines[2].split() == ["us", "us", "us", "GB/s", "GB/s", "p50", "up", "memcpy"]
    assert " ".join(lines[4].split()) == "dispatch BF16 4 100 109 110 0.29 0.72 250 2.5x 1.25"
    assert lines[5].split() == ["send", "4", "30.0", "30.0", "30.0"]
    assert [line.split()[0] for line in lines[8:12]] == ["dispatch", "send", "hook", "dispatch"]
    assert any("checked on all ranks" in line for line in lines)
    assert not any(line.startswith("rail of rank 0") for line in lines)


def test_table_says_how_nodes_are_reached(capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of("--ranks", "2")
    rail = (
        "backend    cuda\nrail       ranks [0, 2], once a node\n           by loads\nsms        4"
    )
    print_results(config, _results(config, rail))
    last = capfd.readouterr().out.splitlines()[-1]
    way = "ranks [0, 2], once a node by loads"
    assert last == f"rail of rank 0: {way}; one BF16 dispatch sent 2.5 MB over it."


def test_json_holds_what_a_reader_needs_to_repeat_it(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    config = config_of("--ranks", "2", "--tokens", "4,8", "--json", str(path))
    write_json(path, config, _results(config))
    document = json.loads(path.read_text())
    assert document["command"] == config.command
    assert document["axes"]["tokens"] == [4, 8]
    assert document["axes"]["recv_layout"] == "token"
    assert document["row_bytes"]["dispatch FP8"] == 7168 + 56 * 4
    assert document["versions"]["torch"] == torch.__version__
    assert document["hardware"]["cores"] >= 1
    assert [result["tokens"] for result in document["results"]] == [4, 8]
    figure = document["results"][0]["figures"][0]
    assert (figure["p50_us"], figure["baseline_p50_us"], figure["speedup"]) == (100.0, 250.0, 2.5)
    timings = document["results"][0]["timings"]
    assert timings["gloo dispatch BF16"]["samples_us"] == [250.0] * 3
    assert socket.gethostname() not in path.read_text().replace("localhost", "")


@pytest.mark.parametrize("tokens", ["4", "4,8,16"])
def test_plot_draws_every_operation(tmp_path: Path, tokens: str) -> None:
    image = pytest.importorskip("matplotlib.image", reason="needs the bench extra")
    path = tmp_path / "out.png"
    config = config_of("--ranks", "2", "--tokens", tokens, "--plot", str(path))
    write_plot(path, config, _results(config))
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 400
    for red, green, blue in ((11, 110, 153), (224, 160, 48)):  # ours and memcpy
        wanted = torch.tensor([red, green, blue]) / 255
        near = (torch.from_numpy(pixels.copy()) - wanted).abs().amax(dim=-1) < 0.02
        assert near.sum() > 50
