# SPDX-License-Identifier: Apache-2.0
"""Writes deepcomm/_C.pyi from the built extension: `python .ci/stub.py [FILE]`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).parents[1] / "deepcomm" / "_C.pyi"
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Generated from the built extension by `python .ci/stub.py`; do not edit.
"""


def generate() -> str:
    """Return the text of the stub of the installed ``deepcomm._C``."""
    with tempfile.TemporaryDirectory() as folder:
        # Run elsewhere: in the checkout, the sources would hide an installed package.
        command = [sys.executable, "-m", "mypy.stubgen", "--inspect-mode", "--include-docstrings"]
        subprocess.run(
            [*command, "-q", "-m", "deepcomm._C", "-o", folder],
            cwd=folder,
            check=True,
        )
        return HEAD + Path(folder, "deepcomm", "_C.pyi").read_text()


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else STUB).write_text(generate())
