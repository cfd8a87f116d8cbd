# SPDX-License-Identifier: Apache-2.0
"""The committed stubs of the extension say what the built extension offers."""

from __future__ import annotations

import difflib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "deepcomm" / "_C"


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.pyi"))}


def test_stubs_match_the_built_extension(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / ".ci" / "stub.py", tmp_path], check=True)
    committed, built = read(STUBS), read(tmp_path)
    assert list(committed) == list(built), "regenerate them: python .ci/stub.py"
    difference = [
        line
        for name, text in built.items()
        for line in difflib.unified_diff(
            committed[name].splitlines(), text.splitlines(), f"committed {name}", "built", n=1
        )
    ]
    assert "\n".join(difference) == "", "regenerate them: python .ci/stub.py"


def test_stubs_are_installed_beside_the_extension() -> None:
    import deepcomm._C

    installed = Path(deepcomm._C.__file__).parent
    assert read(installed / "_C") == read(STUBS)
    assert (installed / "py.typed").exists()
