# SPDX-License-Identifier: Apache-2.0
"""The policy of tests/conftest.py, run on a small suite of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"

EXPLAINED = "import pytest\ndef test_it(): pytest.skip('no such device')"
UNEXPLAINED = "import pytest\ndef test_it(): pytest.skip('')"
UNEXPLAINED_MARK = "import pytest\n@pytest.mark.skip\ndef test_it(): pass"
NO_GPU = "import pytest\n@pytest.mark.gpu(4096)\ndef test_it(): pass"
NO_CLIENT = "import pytest\n@pytest.mark.clients('no_such_module')\ndef test_it(): pass"
WHOLE_MODULE = "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass"
EXPECTED_FAILURE = "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False"

FORBIDDEN = "--allow-skips="
GPU_ONLY = "--allow-skips=gpu"


def run_suite(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder / "conftest.py")
    (folder / "test_sample.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesis"]
    # PYTEST_ADDOPTS would hand this run's own options to the inner one.
    return subprocess.run(
        [*command, *options, "."],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(Path(sys.executable).parent)},
    )


@pytest.mark.parametrize(
    ("source", "options", "passes"),
    [
        pytest.param(EXPLAINED, (), True, id="reason-local"),
        pytest.param(EXPLAINED, (GPU_ONLY,), False, id="reason-unexpected-in-ci"),
        pytest.param(UNEXPLAINED, (), False, id="no-reason"),
        pytest.param(UNEXPLAINED_MARK, (), False, id="no-reason-mark"),
        pytest.param(NO_GPU, (GPU_ONLY,), True, id="gpu-allowed-in-ci"),
        pytest.param(NO_GPU, (FORBIDDEN,), False, id="gpu-expected"),
        pytest.param(NO_CLIENT, ("--allow-skips=gpu,clients",), True, id="client-allowed"),
        pytest.param(NO_CLIENT, (FORBIDDEN,), False, id="client-expected"),
        pytest.param(WHOLE_MODULE, (GPU_ONLY,), False, id="module-unexpected-in-ci"),
        pytest.param(EXPECTED_FAILURE, (FORBIDDEN,), True, id="xfail-is-no-skip"),
    ],
)
def test_skip_policy_decides(
    tmp_path: Path, source: str, options: tuple[str, ...], passes: bool
) -> None:
    result = run_suite(tmp_path, source, *options)
    assert (result.returncode == 0) == passes, result.stdout + result.stderr
    closing_line = result.stdout.splitlines()[-1]
    assert (" failed" in closing_line or " error" in closing_line) != passes, result.stdout


def test_skip_policy_failure_names_test_and_reason(tmp_path: Path) -> None:
    result = run_suite(tmp_path, EXPLAINED, GPU_ONLY)
    assert "test_sample.py::test_it: expected to run here" in result.stdout
    assert "no such device" in result.stdout
