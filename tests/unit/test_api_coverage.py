# SPDX-License-Identifier: Apache-2.0
"""Every public symbol, and every public member of Buffer, is used by some test."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import deepcomm

TESTS = Path(__file__).parents[1]
# Re-exports are covered by their own modules; these modules are the public ones.
PUBLIC_MODULES = (
    "deepcomm",
    "deepcomm.compat",
    "deepcomm.functional",
    "deepcomm.nn",
    "deepcomm.testing",
)


def names_used(source: str) -> set[str]:
    """Return every name, attribute, keyword and imported name in a Python source."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used.update(alias.name for alias in node.names)
    return used


@pytest.fixture(scope="module")
def used_by_tests() -> set[str]:
    files = set(TESTS.rglob("*.py")) - {Path(__file__)}
    return set().union(*(names_used(path.read_text()) for path in files))


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_api_coverage_every_public_symbol_has_a_test(module: str, used_by_tests: set[str]) -> None:
    public = importlib.import_module(module).__all__
    assert sorted(set(public) - used_by_tests - {"__version__"}) == []


def test_api_coverage_every_buffer_member_has_a_test(used_by_tests: set[str]) -> None:
    members = {name for name in vars(deepcomm.Buffer) if not name.startswith("_")}
    assert members >= {"dispatch", "combine", "close"}
    assert sorted(members - used_by_tests) == []


def test_api_submodules_import_without_cuda() -> None:
    for info in pkgutil.walk_packages(deepcomm.__path__, "deepcomm."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
