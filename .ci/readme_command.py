# SPDX-License-Identifier: Apache-2.0
"""Prints a quick-start command of README.md: `python .ci/readme_command.py bench|test`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def command(readme: str, name: str) -> str:
    """Return the one-line shell block that follows the comment ``<!-- command: name -->``."""
    match = re.search(rf"<!-- command: {name} -->\n+```bash\n(.*)\n```", readme)
    if match is None:
        raise SystemExit(f"README.md has no one-line command {name!r}")
    return match.group(1)


if __name__ == "__main__":
    print(command(README.read_text(), sys.argv[1]))
