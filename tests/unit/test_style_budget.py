# SPDX-License-Identifier: Apache-2.0
"""Budgets of files, functions and parameters; exceptions carry their reason here."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("deepcomm", "csrc", "tests", "benchmarks", "examples", ".ci")
CXX_SUFFIXES = {".hpp", ".cpp", ".cuh", ".cu"}

FILE_LINES = 400
FILE_LINES_HARD = 600
FUNCTION_LINES = 40
PARAMETERS = 6
PARAMETERS_HARD = 10

CLIENTS = "a signature that clients call"
PLUGIN = "tests/multinode/gin_loopback/plugin.cpp"
NCCL = "a signature that NCCL calls"

# (file, what is over budget) -> reason. A function's budget counts neither docstring nor signature.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("deepcomm/buffer.py", "file"): "the operations' contracts are its docstrings",
    ("deepcomm/buffer.py", "Buffer.__init__"): "configuration by keyword, stored as BufferConfig",
    ("deepcomm/buffer.py", "Buffer.dispatch"): "options by keyword, passed on as DispatchRequest",
    ("deepcomm/buffer.py", "Buffer.combine"): "options by keyword, passed on as CombineRequest",
    ("deepcomm/buffer.py", "Buffer.low_latency_dispatch"): "likewise DispatchRequest",
    ("deepcomm/buffer.py", "Buffer.low_latency_combine"): "likewise CombineRequest",
    ("deepcomm/compat/buffer.py", "Buffer.__init__"): CLIENTS,
    ("deepcomm/compat/buffer.py", "Buffer.dispatch"): CLIENTS,
    ("deepcomm/compat/buffer.py", "Buffer.combine"): CLIENTS,
    ("deepcomm/compat/elastic.py", "ElasticBuffer.__init__"): CLIENTS,
    ("deepcomm/compat/elastic.py", "ElasticBuffer.get_buffer_size_hint"): CLIENTS,
    ("deepcomm/compat/elastic.py", "ElasticBuffer.get_theoretical_num_sms"): CLIENTS,
    ("deepcomm/compat/elastic.py", "ElasticBuffer.dispatch"): CLIENTS,
    ("deepcomm/compat/elastic.py", "ElasticBuffer.combine"): CLIENTS,
    ("deepcomm/compat/handles.py", "EPHandle.__init__"): CLIENTS,
    ("deepcomm/compat/low_latency.py", "LowLatencyOperations.low_latency_dispatch"): CLIENTS,
    ("deepcomm/compat/low_latency.py", "LowLatencyOperations.low_latency_combine"): CLIENTS,
    ("deepcomm/sizing.py", "buffer_bytes"): "sizes by keyword, named as for Buffer",
    ("csrc/bindings/simd.cpp", "cast_rows"): "a binding: its parameters are Python keywords",
    ("csrc/bindings/simd.cpp", "make_reduction"): "a binding: its parameters are Python keywords",
    ("csrc/layout/segment.hpp", "make"): "one cursor hands out one byte map from top to bottom",
    (PLUGIN, "register_memory"): NCCL,
    (PLUGIN, "register_dma_buf"): NCCL,
    (PLUGIN, "put"): NCCL,
    (PLUGIN, "put_signal"): NCCL,
    (PLUGIN, "get"): NCCL,
    ("deepcomm/functional.py", "dispatch"): "keywords of Buffer.dispatch",
    ("deepcomm/reference.py", "dispatch"): "keywords of Buffer.dispatch",
    ("deepcomm/reference.py", "low_latency_dispatch"): "keywords of Buffer.low_latency_dispatch",
    ("deepcomm/reference.py", "low_latency_combine"): "keywords of Buffer.low_latency_combine",
}

Offence: TypeAlias = tuple[str, str]
AnyFunction: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

CXX_NOISE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
CXX_CALL = re.compile(r"\b([A-Za-z_][\w:~]*)\s*\(")
CXX_BODY = re.compile(r"\s*(?:(?:const|noexcept|override|final)\s*)*(?:->\s*[\w:<>*&\s]+)?\{")
CXX_KEYWORDS = {"if", "for", "while", "switch", "catch", "sizeof", "return", "defined", "decltype"}


def python_offences(path: str, source: str) -> dict[Offence, str]:
    """Return the functions of one Python file that are over budget, with what they measure."""
    offences = {}
    for name, node, is_method in functions(ast.parse(source), prefix="", in_class=False):
        body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        lines = (node.end_lineno or 0) - body[0].lineno + 1
        arguments = node.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - is_method
        if lines > FUNCTION_LINES:
            offences[path, name] = f"{lines} lines"
        if count > PARAMETERS:
            offences[path, name] = f"{count} parameters"
    return offences


def functions(node: ast.AST, prefix: str, in_class: bool) -> list[tuple[str, AnyFunction, bool]]:
    """Return (qualified name, function, whether its first parameter is implied) below node."""
    found = []
    for child in ast.iter_child_nodes(node):
        is_class = isinstance(child, ast.ClassDef)
        if isinstance(child, AnyFunction):
            decorators = {d.id for d in child.decorator_list if isinstance(d, ast.Name)}
            found.append(
                (prefix + child.name, child, in_class and "staticmethod" not in decorators)
            )
        if is_class or isinstance(child, AnyFunction):
            found += functions(child, f"{prefix}{child.name}.", is_class)
        else:
            found += functions(child, prefix, in_class)
    return found


def cxx_offences(path: str, source: str) -> dict[Offence, str]:
    """Return the functions of one C++ file that are over budget, found by their brackets."""
    code = CXX_NOISE.sub(lambda noise: re.sub(r"[^\n]", " ", noise.group()), source)
    offences = {}
    for match in CXX_CALL.finditer(code):
        name = match.group(1)
        end = closing(code, match.end() - 1)
        body = CXX_BODY.match(code, end + 1)
        if name in CXX_KEYWORDS or body is None:
            continue
        lines = code.count("\n", body.end(), closing(code, body.end() - 1))
        count = num_parameters(code[match.end() : end])
        # A bind_ function is a list of names without logic: its length says nothing.
        if lines > FUNCTION_LINES and not name.startswith("bind_"):
            offences[path, name] = f"{lines} lines"
        if count > PARAMETERS:
            offences[path, name] = f"{count} parameters"
    return offences


def closing(code: str, start: int) -> int:
    """Return the index of the bracket that closes the one at start, or the end of code."""
    depth = 0
    for index in range(start, len(code)):
        depth += (code[index] in "({[") - (code[index] in ")}]")
        if depth == 0:
            return index
    return len(code)


def num_parameters(text: str) -> int:
    """Return the number of parameters in the text between a function's parentheses."""
    depth = commas = 0
    for char in text:
        depth += (char in "({[<") - (char in ")}]>")
        commas += char == "," and depth == 0
    return commas + 1 if text.strip() else 0


def files(suffixes: set[str]) -> list[tuple[str, str]]:
    return [
        (path.relative_to(ROOT).as_posix(), path.read_text())
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes
    ]


def all_offences() -> dict[Offence, str]:
    offences: dict[Offence, str] = {}
    for path, source in files(CXX_SUFFIXES | {".py"}):
        lines = source.count("\n")
        if lines > FILE_LINES:
            offences[path, "file"] = f"{lines} lines"
        rule = python_offences if path.endswith(".py") else cxx_offences
        offences |= rule(path, source)
    return offences


def test_style_budget_has_no_unexplained_offender() -> None:
    offences = all_offences()
    assert {key: what for key, what in offences.items() if key not in EXCEPTIONS} == {}


def test_style_budget_exceptions_are_still_needed() -> None:
    assert set(EXCEPTIONS) - set(all_offences()) == set()


def test_style_budget_files_stay_under_the_hard_limit() -> None:
    lengths = {path: text.count("\n") for path, text in files(CXX_SUFFIXES | {".py"})}
    assert lengths, "no sources found"
    assert {path: lines for path, lines in lengths.items() if lines > FILE_LINES_HARD} == {}


def test_style_heads_name_the_licence_and_sources_are_ascii() -> None:
    sources = files(CXX_SUFFIXES | {".py"})
    assert [
        path for path, text in sources if "SPDX-License-Identifier: Apache-2.0" not in text[:80]
    ] == []
    assert [path for path, text in sources if not text.isascii()] == []


LONG_BODY = "x = 1;\n" * 41


@pytest.mark.parametrize(
    ("source", "names"),
    [
        pytest.param("def f(a, b, c, d, e, f): pass", set(), id="six"),
        pytest.param("def f(a, b, c, d, e, *, f, g): pass", {"f"}, id="keywords-count"),
        pytest.param("class A:\n def f(self, a, b, c, d, e, f): pass", set(), id="self-is-free"),
        pytest.param("def f():\n" + " x = 1\n" * 40, set(), id="forty-lines"),
        pytest.param("def f():\n" + " x = 1\n" * 41, {"f"}, id="long"),
        pytest.param(
            'def f():\n """Why.' + "\n" * 50 + '"""\n return 1\n', set(), id="docstring-is-free"
        ),
        pytest.param("class A:\n def f():\n" + "  x = 1\n" * 41, {"A.f"}, id="qualified"),
    ],
)
def test_style_budget_judges_python(source: str, names: set[str]) -> None:
    assert {name for _, name in python_offences("a.py", source)} == names


@pytest.mark.parametrize(
    ("source", "names"),
    [
        pytest.param(
            "int f(int a, std::map<int, int> b) { return g(1, 2, 3, 4, 5, 6, 7); }", set(), id="ok"
        ),
        pytest.param(
            "int f(int a, int b, int c, int d, int e, int f, int g) {}", {"f"}, id="seven"
        ),
        pytest.param("void A::f() const {\n" + LONG_BODY + "}", {"A::f"}, id="long"),
        pytest.param(
            "void f() {\n" + "// why\n" * 20 + "x = 1;\n" * 19 + "}", set(), id="forty-lines"
        ),
        pytest.param("if (a(b, c)) {\n" + LONG_BODY + "}", set(), id="no-function"),
        pytest.param("// int f(a, b, c, d, e, f, g) {}", set(), id="comment"),
    ],
)
def test_style_budget_judges_cxx(source: str, names: set[str]) -> None:
    assert {name for _, name in cxx_offences("a.cpp", source)} == names
