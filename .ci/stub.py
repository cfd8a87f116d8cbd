# SPDX-License-Identifier: Apache-2.0
"""Writes the stubs deepcomm/_C/*.pyi from the built extension: `python .ci/stub.py [FOLDER]`."""

from __future__ import annotations

import importlib
import re
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


# Their home depends on the version of Python that pybind11 compiles for.
MOVING = re.compile(r"\b(?:typing_extensions|types|collections\.abc)\.(?:Buffer|CapsuleType)\b")
IMPORT = re.compile(r"^import (\S+)\n", re.MULTILINE)


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
        output = Path(folder, "output")
        options = ["--inspect-mode", "-q", "-o", str(output)]
        modules = [part for name in names for part in ("-m", f"deepcomm._C.{name}")]
        subprocess.run(
            [sys.executable, "-c", "from mypy.stubgen import main; main()", *options, *modules],
            # Neither the checkout's sources nor the output may hide the installed package.
            cwd=folder,
            check=True,
        )
        for name in names:
            text = Path(output, "deepcomm", "_C", f"{name}.pyi").read_text()
            stubs[f"{name}.pyi"] = HEAD + settle(text)
    return stubs


def settle(text: str) -> str:
    """Return the stub in the same words for every version of Python."""
    text = MOVING.sub("object", text)
    body = IMPORT.sub("", text)
    return IMPORT.sub(lambda line: line.group() if f"{line.group(1)}." in body else "", text)


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
