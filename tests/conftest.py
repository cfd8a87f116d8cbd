# SPDX-License-Identifier: Apache-2.0
"""Markers, what each needs of the machine, and the policy on skips.

A skip without a reason is a failure. Under ``--allow-skips=MARKS`` (continuous integration) so is
the skip of a test that carries none of MARKS: that test was expected to run there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import ModuleType

MARKERS = (
    "clients(module, ...): needs programs written against DeepEP (extra compat-test)",
    "emulated_backend: the CUDA backend on the emulator, minutes of compiling; --emulated-backend",
    "gpu(n=1): needs n CUDA devices, and NVRTC",
    "multi_node: plays several nodes in network namespaces; needs root and iproute2",
    "nccl: needs NVIDIA's wheel of NCCL, with its header (extra cu12 or cu13)",
    "nvrtc: needs NVRTC through CuPy and CUDA's headers (extra cu12 or cu13)",
    "slow: more of what quicker tests try too, many seconds each; --slow",
)
NO_REASON = ("", "unconditional skip")


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load_benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return what imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--allow-skips",
        metavar="MARKS",
        help="comma-separated marks whose tests may be skipped; any other skip is a failure",
    )
    parser.addoption(
        "--emulated-backend",
        action="store_true",
        help="also run the CUDA backend's kernels on the emulator: minutes of compiling at first",
    )
    parser.addoption("--slow", action="store_true", help="also run the tests that take long")
    parser.addoption(
        "--soak-rounds",
        type=int,
        default=200,
        help="rounds of the random soak on GPUs, about 3 operations each; many need --timeout=0",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    gpu = item.get_closest_marker("gpu")
    if gpu:
        wanted = gpu.args[0] if gpu.args else 1
        if (present := num_gpus()) < wanted:
            pytest.skip(f"needs {wanted} CUDA device(s), found {present}")
        if reason := missing_nvrtc():
            pytest.skip(reason)
    if item.get_closest_marker("emulated_backend") and not item.config.getoption(
        "--emulated-backend"
    ):
        pytest.skip("takes minutes of compiling; asked for by --emulated-backend")
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes long; asked for by --slow")
    if item.get_closest_marker("multi_node"):
        if os.geteuid() != 0:
            pytest.skip("needs root to make network namespaces")
        if shutil.which("ip") is None:
            pytest.skip("needs iproute2 to make network namespaces")
    for marker in item.iter_markers("clients"):
        if missing := [name for name in marker.args if importlib.util.find_spec(name) is None]:
            pytest.skip(f"needs {', '.join(missing)} (extra compat-test)")
    if item.get_closest_marker("nccl") and not has_nccl_wheel():
        pytest.skip("needs NVIDIA's wheel of NCCL (extra cu12 or cu13)")
    if item.get_closest_marker("nvrtc") and (reason := missing_nvrtc()):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        enforce_skip_policy(report, item.config, {mark.name for mark in item.iter_markers()})
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:
        # NOTE: a module that skips itself has no marks yet that could excuse it.
        enforce_skip_policy(report, collector.config, set())
    return report


def enforce_skip_policy(
    report: pytest.TestReport | pytest.CollectReport, config: pytest.Config, marks: set[str]
) -> None:
    """Turn a skip that has no reason, or that was not expected here, into a failure."""
    reason = skip_reason(report)
    allowed = config.getoption("--allow-skips")
    if reason in NO_REASON:
        verdict = "skipped without a reason"
    elif allowed is not None and not marks & set(allowed.split(",")):
        verdict = f"expected to run here (only {allowed or 'nothing'} may skip), but: {reason}"
    else:
        return
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {verdict}"


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the reason a skipped report gives; pytest stores (path, line, 'Skipped: reason')."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped").lstrip(":").strip()


def missing_nvrtc() -> str:
    """Return why kernels cannot be compiled here, "" where they can."""
    from deepcomm import jit

    try:
        jit.find_nvrtc()
    except jit.CompilerMissing as error:
        return str(error)
    return ""


def has_nccl_wheel() -> bool:
    """Return whether NVIDIA's wheel of NCCL is installed."""
    from deepcomm.backends.cuda.nccl import find_wheel

    return find_wheel() is not None


def num_gpus() -> int:
    """Return the number of CUDA devices that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
