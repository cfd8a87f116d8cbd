# SPDX-License-Identifier: Apache-2.0
"""Writes the stubs deepcomm/_C/*.pyi from the built extension: `python .ci/stub.py [FOLDER]`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

STUBS = Path(__file__).parents[1] / "deepcomm" / "_C"
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Generated from the built extension by `python .ci/stub.py`; do not edit.
"""


def submodules() -> list[str]:
    """Return the names of the parts of the installed ``deepcomm._C``."""
    extension = importlib.import_module("deepcomm._C")
    return sorted(name for name, it in vars(extension).items() if isinstance(it, ModuleType))


def generate() -> dict[str, str]:
    """Return the text of each stub, by file name."""
    names = submodules()
    imports = "".join(f"from . import {name} as {name}\n" for name in names)
    stubs = {"__init__.pyi": f"{HEAD}{imports}"}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--inspect-mode", "-q", "-o", folder]
        modules = [part for name in names for part in ("-m", f"deepcomm._C.{name}")]
        subprocess.run(
            [sys.executable, "-c", "from mypy.stubgen import main; main()", *options, *modules],
            cwd=folder,  # in the checkout, the sources would hide an installed package
            check=True,
        )
        for name in names:
            stubs[f"{name}.pyi"] = HEAD + Path(folder, "deepcomm", "_C", f"{name}.pyi").read_text()
    return stubs


def main(folder: Path) -> None:
    """Replace the stubs in ``folder``."""
    stubs = generate()
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.pyi"):
        old.unlink()
    for name, text in stubs.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else STUBS)
