# SPDX-License-Identifier: Apache-2.0
"""Direction of the C++ modules: who may include whom, and who owns which facility.

common <- layout <- device <- kernels
common <- layout <- host, cpu, emu <- bindings
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SUFFIXES = {".hpp", ".cpp", ".cuh", ".cu", ".h", ".cc"}

# The longest prefix of a file's path that is a key names its module. A module may always include
# itself.
MAY_INCLUDE = {
    "common": set(),
    "layout": {"common"},
    "device": {"common", "layout", "device/cuda", "device/emu"},
    "device/cuda": {"common", "layout", "device"},
    "device/emu": {"common", "layout", "device", "emu"},
    "kernels": {"common", "layout", "device"},
    "host": {"common", "layout", "kernels"},
    "cpu": {"common", "layout"},
    "emu": {"common", "layout"},
    "bindings": {"common", "layout", "kernels", "host", "cpu", "emu"},
}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
STRING = re.compile(r'"(?:\\.|[^"\\\n])*"')


@dataclass(frozen=True)
class Facility:
    """Something that only some files may use."""

    pattern: re.Pattern[str]
    owners: tuple[str, ...]


FACILITIES = {
    "pybind11": Facility(re.compile(r"\bpybind11\b|\bpy::"), ("bindings/",)),
    "getenv": Facility(re.compile(r"\b(?:secure_)?getenv\b"), ("common/env.cpp",)),
    # A fiber switch saves registers: there is no other way to write one.
    "asm": Facility(re.compile(r"\b(?:asm|__asm__)\b"), ("device/cuda/", "emu/fiber")),
    "CUDA": Facility(re.compile(r"#\s*include\s*<cuda[^>]*>"), ("device/cuda/", "host/")),
    "torch": Facility(re.compile(r"#\s*include\s*[<\"](?:torch|ATen|c10)/"), ()),
}


def module_of(path: str) -> str:
    """Return the module of a path relative to csrc, "" for a path outside every module."""
    owners = [name for name in MAY_INCLUDE if path.startswith(name + "/")]
    return max(owners, key=len, default="")


def upward_edges(path: str, text: str) -> list[str]:
    """Return what is wrong with the includes of one file of csrc, one line each."""
    module = module_of(path)
    problems = []
    for kind, target in INCLUDE.findall(without_comments(text)):
        owner = module_of(target)
        if kind == '"' and not owner:
            problems.append(f'{path}: "{target}": name project files from csrc, others with <>')
        elif owner and owner != module and owner not in MAY_INCLUDE[module]:
            problems.append(f"{path}: {module} must not include {owner} ({target})")
        elif module in ("host", "bindings") and target.endswith(".cuh"):
            problems.append(
                f"{path}: {module} includes parameter structs, never a kernel ({target})"
            )
    return problems


def foreign_uses(path: str, text: str) -> list[str]:
    """Return the facilities that one file uses without being among their owners."""
    code = without_comments(text)
    return [
        f"{path}: {name} belongs to {', '.join(facility.owners) or 'no file'}"
        for name, facility in FACILITIES.items()
        if not path.startswith(facility.owners or ("/",))
        and facility.pattern.search(code if "include" in facility.pattern.pattern else bare(code))
    ]


def without_comments(text: str) -> str:
    return COMMENT.sub("", text)


def bare(code: str) -> str:
    """Return code without string literals, except in include lines."""
    return STRING.sub('""', code)


def sources() -> list[tuple[str, str]]:
    return [
        (path.relative_to(CSRC).as_posix(), path.read_text())
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in SUFFIXES
    ]


def test_include_graph_every_source_belongs_to_a_module() -> None:
    assert sources(), "no sources found: the other tests here would assert nothing"
    assert [path for path, _ in sources() if not module_of(path)] == []


def test_include_graph_has_no_upward_edge() -> None:
    assert [problem for path, text in sources() for problem in upward_edges(path, text)] == []


def test_include_graph_facilities_stay_with_their_owners() -> None:
    assert [problem for path, text in sources() for problem in foreign_uses(path, text)] == []


def test_include_graph_is_acyclic_apart_from_the_two_device_layers() -> None:
    # device names its operations once and picks one of two implementations, which see its types.
    merged = {name: name.split("/")[0] for name in MAY_INCLUDE}
    order: list[str] = []
    remaining = set(merged.values())
    while remaining:
        free = {
            name
            for name in remaining
            if all(
                merged[low] not in remaining - {name}
                for key in MAY_INCLUDE
                if merged[key] == name
                for low in MAY_INCLUDE[key]
            )
        }
        assert free, f"cycle among {sorted(remaining)}"
        order += sorted(free)
        remaining -= free
    assert order[0] == "common"
    assert order[-1] == "bindings"


@pytest.mark.parametrize(
    ("path", "line", "is_wrong"),
    [
        ("layout/a.hpp", '#include "common/int.hpp"', False),
        ("layout/a.hpp", '#include "cpu/a.hpp"', True),
        ("layout/a.hpp", '// #include "cpu/a.hpp"', False),
        ("common/a.hpp", "#include <cstdint>", False),
        ("cpu/a.cpp", '#include "a.hpp"', True),
        ("host/a.cpp", '#include "kernels/dispatch/params.hpp"', False),
        ("host/a.cpp", '#include "kernels/dispatch/kernel.cuh"', True),
        ("kernels/a.cuh", '#include "host/a.hpp"', True),
        ("device/emu/a.cuh", '#include "emu/a.hpp"', False),
    ],
)
def test_include_graph_rule_judges_edge(path: str, line: str, is_wrong: bool) -> None:
    assert bool(upward_edges(path, line)) == is_wrong


@pytest.mark.parametrize(
    ("path", "line", "is_wrong"),
    [
        ("bindings/a.cpp", "#include <pybind11/pybind11.h>", False),
        ("cpu/a.cpp", "#include <pybind11/pybind11.h>", True),
        ("common/env.cpp", 'std::getenv("A")', False),
        ("cpu/a.cpp", 'std::getenv("A")', True),
        ("cpu/a.cpp", 'log("call getenv for it");  // getenv', False),
        ("device/cuda/ld.cuh", 'asm volatile("")', False),
        ("emu/fiber.cpp", 'asm volatile("")', False),
        ("cpu/a.cpp", '__asm__ volatile("")', True),
        ("layout/a.hpp", "#include <cuda_fp8.h>", True),
        ("cpu/a.cpp", "#include <torch/extension.h>", True),
    ],
)
def test_include_graph_rule_judges_facility(path: str, line: str, is_wrong: bool) -> None:
    assert bool(foreign_uses(path, line)) == is_wrong
