# SPDX-License-Identifier: Apache-2.0
"""The committed stub of the extension says what the built extension offers."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = ROOT / "deepcomm" / "_C.pyi"


def test_stub_matches_the_built_extension(tmp_path: Path) -> None:
    fresh = tmp_path / "_C.pyi"
    subprocess.run([sys.executable, ROOT / ".ci" / "stub.py", fresh], check=True)
    difference = difflib.unified_diff(
        STUB.read_text().splitlines(), fresh.read_text().splitlines(), "committed", "built", n=1
    )
    assert "\n".join(difference) == "", "regenerate it: python .ci/stub.py"


def test_stub_is_installed_beside_the_extension() -> None:
    import deepcomm._C

    installed = Path(deepcomm._C.__file__).parent
    assert (installed / "_C.pyi").read_text() == STUB.read_text()
    assert (installed / "py.typed").exists()
