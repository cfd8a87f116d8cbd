# SPDX-License-Identifier: Apache-2.0
"""The structs that the tests launch with have the layout that the kernels expect."""

from __future__ import annotations

import subprocess
from ctypes import Structure, sizeof
from pathlib import Path

import pytest
from gpu import params
from gpu.launch import ERROR_RECORD

CSRC = Path(__file__).resolve().parents[2] / "csrc"


def assert_same_layout(tmp_path: Path, name: str, size: int, offsets: dict[str, int]) -> None:
    """Let the host compiler compare a struct with what is expected of it."""
    lines = [
        "#include <cstddef>",
        '#include "kernels/probe/params.hpp"',
        "using namespace deepcomm::kernels;",
        f'static_assert(sizeof({name}) == {size}, "size");',
        *(f'static_assert(offsetof({name}, {f}) == {at}, "{f}");' for f, at in offsets.items()),
    ]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines))
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{CSRC}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("struct", params.ALL, ids=lambda struct: struct.__name__)
def test_params_match_the_kernels_struct(struct: type[Structure], tmp_path: Path) -> None:
    offsets = {name: getattr(struct, name).offset for name, _ in struct._fields_}
    assert_same_layout(tmp_path, struct.__name__, sizeof(struct), offsets)


def test_params_error_record_matches_the_layout(tmp_path: Path) -> None:
    fields = ERROR_RECORD.fields
    assert fields is not None
    offsets = {name: entry[1] for name, entry in fields.items()}
    name = "deepcomm::layout::ErrorRecord"
    assert_same_layout(tmp_path, name, ERROR_RECORD.itemsize, offsets)
