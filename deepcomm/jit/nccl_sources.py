# SPDX-License-Identifier: Apache-2.0
"""NCCL's device headers as NVRTC can compile them: in memory, with the habits undone that it lacks.

They name each other relative to themselves, which NVRTC does not resolve in memory; they declare
functions of the host and arrays without elements, which it refuses, and have typeof of other
compilers; and they put attributes such as
``packed`` behind the closing brace, where it ignores them without a word, so that structs shared
with NCCL's host code would get another layout: before the brace it heeds them.
"""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["SHIMS", "adapt", "collect_nccl"]

ENTRY: Final = "nccl_device.h"
INCLUDE = re.compile(r'^(\s*#\s*include\s*)(?:"([^"]+)"|<(nccl[^>]*)>)', re.MULTILINE)
TRAILING = re.compile(r"\}\s*((?:__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)\s*)+)")
HEAD = re.compile(r"\b(struct|union)(\s+\w+)?\s*$")
HOST_ONLY = re.compile(r"\b__host__ (?!__device__)")
TYPEOF = re.compile(r"(#define \w*TYPEOF\(x\) )(?:decltype|__typeof__)\(x\)")
PARTS = re.compile(r"\[sizeof\(T\) ?/ ?(\d+)\]")

INTEGERS: Final = "#pragma once\n#include <cuda/std/cstddef>\n#include <cuda/std/cstdint>\n"
EMPTY: Final = "#pragma once\n"
KERNEL_TYPES: Final = "".join(
    f"typedef uint{bits}_t __u{bits};\n" + f"typedef uint{bits}_t __be{bits};\n" * (bits > 8)
    for bits in (8, 16, 32, 64)
)

SHIMS: Final = {
    **dict.fromkeys(("cstdint", "stddef.h", "stdint.h"), INTEGERS),
    **dict.fromkeys(("algorithm", "assert.h", "cassert", "math.h", "new"), EMPTY),
    **dict.fromkeys(("stdbool.h", "stdio.h", "stdlib.h"), EMPTY),
    "errno.h": "#pragma once\n#define EIO 5\n#define EBUSY 16\n#define EINVAL 22\n",
    "limits.h": "#pragma once\n#include <cuda/std/climits>\n",
    "linux/types.h": INTEGERS + KERNEL_TYPES,
    "type_traits": "#pragma once\n#include <cuda/std/type_traits>\n"
    "namespace std { using namespace cuda::std; }\n",
}
"""What they include of the C and C++ libraries, as far as they use it on the device.

NVRTC brings ``assert`` and placement new itself.
"""


def collect_nccl(folder: Path) -> dict[str, str]:
    """Return name and adapted text of NCCL's device header and of all that it includes with it."""
    found: dict[str, str] = {}
    open_names = [ENTRY]
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        text = adapt((folder / name).read_text())

        def place(match: re.Match[str], base: str = posixpath.dirname(name)) -> str:
            target = _resolve(folder, base, match[2] or match[3])
            if target is None:
                return match[0]
            open_names.append(target)
            return f'{match[1]}"{target}"'

        found[name] = INCLUDE.sub(place, text)
    return dict(sorted(found.items()))


def _resolve(folder: Path, base: str, name: str) -> str | None:
    """Return the name of an included file from the folder, None where it is not in it."""
    for candidate in (posixpath.normpath(posixpath.join(base, name)), name):
        if not candidate.startswith("..") and (folder / candidate).is_file():
            return candidate
    return None


def adapt(text: str) -> str:
    """Return a header's text as NVRTC takes it, with the meaning that nvcc gives to it."""
    text = PARTS.sub(r"[(sizeof(T) + \1 - 1) / \1]", HOST_ONLY.sub("", text))
    text = TYPEOF.sub(r"\1cuda::std::remove_reference_t<decltype(x)>", text)
    moves: list[tuple[int, int, str]] = []
    for match in TRAILING.finditer(text):
        begin = _opening(text, match.start())
        head = HEAD.search(text, 0, begin)
        if head is not None:
            moves.append((match.start(1), match.end(1), ""))
            moves.append((head.end(1), head.end(1), f" {match[1].strip()}"))
    for first, last, replacement in sorted(moves, reverse=True):
        text = text[:first] + replacement + text[last:]
    return text


def _opening(text: str, closing: int) -> int:
    """Return where the brace opens that closes at ``closing``; 0 where none does."""
    depth = 0
    for index in range(closing, -1, -1):
        depth += (text[index] == "}") - (text[index] == "{")
        if depth == 0:
            return index
    return 0
