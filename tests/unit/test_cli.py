# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments of ``deepcomm bench`` and findings of ``deepcomm doctor``."""

from __future__ import annotations

import argparse
import json
import socket
from typing import TYPE_CHECKING

import pytest
import torch

from deepcomm.cli import doctor, main
from deepcomm.cli.bench import args
from deepcomm.cli.checks import network
from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.cli.console import print_table
from deepcomm.errors import InvalidArgument
from deepcomm.types import RecvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def config_of(*arguments: str) -> args.BenchConfig:
    parser = argparse.ArgumentParser()
    args.add_parser(parser.add_subparsers())
    return args.make_config(parser.parse_args(["bench", *arguments]), ["bench", *arguments])


# Arguments


def test_bench_defaults_are_a_demonstration_of_four_ranks() -> None:
    config = config_of()
    assert (config.ranks, config.tokens, config.hidden) == (4, (1024,), 7168)
    assert (config.experts, config.topk, config.baseline, config.fp8) == (256, 8, "gloo", True)
    assert config.recv_layout is RecvLayout.TOKEN
    assert config.command == "deepcomm bench"


def test_bench_low_latency_has_its_own_defaults() -> None:
    config = config_of("--mode", "low_latency")
    assert config.tokens == (1, 8, 32, 128)
    assert config.recv_layout is RecvLayout.EXPERT_PADDED
    assert config.iters == 100


def test_bench_takes_several_token_counts_in_order_and_quotes_its_command() -> None:
    config = config_of("--tokens", "32,1,8", "--json", "a b.json")
    assert config.tokens == (1, 8, 32)
    assert config.command == "deepcomm bench --tokens 32,1,8 --json 'a b.json'"


def test_bench_leaves_fp8_out_where_the_hidden_size_forbids_it() -> None:
    assert not config_of("--hidden", "24").fp8
    assert not config_of("--quantize", "none").fp8
    assert config_of("--quantize").fp8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "--hidden", "24"], "--hidden: expected a multiple of 16 for FP8, got 24"),
        (["--experts", "7"], "--experts: expected a multiple of 4 ranks, got 7"),
        (["--baseline", "nccl"], "--baseline nccl: needs --backend cuda"),
        (["--routing", "sideways"], "routing: expected one of uniform"),
        (["--topk", "300"], "num_topk"),
        (["--mode", "low_latency", "--recv-layout", "expert"], "--recv-layout"),
        (["--json", "/nonexistent/x.json"], "--json: expected an existing folder"),
    ],
)
def test_bench_refuses_wrong_arguments(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_bench_says_that_there_is_no_cuda_device(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--backend", "cuda"]) == 2
    assert "torch finds no CUDA device" in capfd.readouterr().err


def test_bench_names_the_extra_that_plots_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidArgument, match=r"pip install deepcomm\[bench\]"):
        config_of("--plot", "x.png")


def test_bench_takes_its_ranks_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert config_of().ranks == 8
    with pytest.raises(InvalidArgument, match="--ranks: expected torchrun's 8, got 4"):
        config_of("--ranks", "4")


def test_unknown_commands_end_with_usage(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["polish"])
    assert "usage: deepcomm" in capfd.readouterr().err


# Doctor


def test_doctor_covers_every_part_and_never_fails(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    findings = json.loads(capfd.readouterr().out)
    names = {finding["name"] for finding in findings}
    assert names >= {"python", "torch", "/dev/shm", "interfaces", "gloo", "driver", "NVRTC", "NCCL"}
    assert status == any(finding["status"] == "FAIL" for finding in findings)
    broken = [finding for finding in findings if finding["status"] in ("WARN", "FAIL")]
    assert all(finding["remedy"] or "itself failed" in finding["detail"] for finding in broken)


def _doctor_with(monkeypatch: pytest.MonkeyPatch, check: Callable[[], Iterator[Finding]]) -> int:
    monkeypatch.setattr(doctor, "CHECKS", (("network", check),))
    return main(["doctor"])


def test_doctor_ends_with_status_1_only_for_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def check(status: Status) -> Callable[[], Iterator[Finding]]:
        return lambda: iter([Finding("network", "part", status, "detail", "do this")])

    assert _doctor_with(monkeypatch, check(Status.WARN)) == 0
    assert "0 broken, 1 to look at" in capfd.readouterr().out
    assert _doctor_with(monkeypatch, check(Status.FAIL)) == 1
    assert "remedy: do this" in capfd.readouterr().out


def test_doctor_survives_a_check_that_raises(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def check() -> Iterator[Finding]:
        raise ZeroDivisionError("inside")

    assert _doctor_with(monkeypatch, check) == 0
    assert "ZeroDivisionError('inside')" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("value", "status"),
    [("nope0", Status.FAIL), ("^docker", Status.OK), (socket.if_nameindex()[0][1], Status.OK)],
)
def test_doctor_checks_the_interface_that_a_variable_names(
    monkeypatch: pytest.MonkeyPatch, value: str, status: Status
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    found = {finding.name: finding.status for finding in network.check_interfaces()}
    assert found["GLOO_SOCKET_IFNAME"] is status


# Console


def test_plain_table_aligns_its_columns(capfd: pytest.CaptureFixture[str]) -> None:
    print_table(["name", "value\nus"], [["a", "1"], ["long name", "1000000"]])
    assert capfd.readouterr().out.splitlines() == [
        "name         value",
        "                us",
        "---------  -------",
        "a                1",
        "long name  1000000",
    ]
