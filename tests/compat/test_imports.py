# SPDX-License-Identifier: Apache-2.0
"""Every import statement of clients succeeds unchanged, and gives the same objects."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from deepcomm import Error, compat
from deepcomm.cli import main

# A statement of a client, and the names that it must give.
STATEMENTS = {
    "from deep_ep import Buffer": ["Buffer"],
    "from deep_ep import Buffer, Config": ["Buffer", "Config"],
    "from deep_ep.utils import EventHandle, EventOverlap": ["EventHandle", "EventOverlap"],
    "from deep_ep import Buffer, EventOverlap": ["Buffer", "EventOverlap"],
    "from deep_ep import EPHandle, EventHandle": ["EPHandle", "EventHandle"],
    "from deep_ep_cpp import EventHandle": ["EventHandle"],
    "from deep_ep_cpp import Config, topk_idx_t": ["Config", "topk_idx_t"],
    "import deep_ep; Buffer = deep_ep.Buffer; ElasticBuffer = deep_ep.ElasticBuffer": [
        "Buffer", "ElasticBuffer"],
    "import deep_ep; topk_idx_t = deep_ep.topk_idx_t": ["topk_idx_t"],
    "from deep_ep import ElasticBuffer": ["ElasticBuffer"],
    "from deep_ep.legacy import Buffer": ["Buffer"],
    "from deep_ep.buffer import Buffer": ["Buffer"],
    "from deep_ep.buffers.legacy import Buffer": ["Buffer"],
    "from deep_ep.buffers.elastic import EPHandle, ElasticBuffer": ["EPHandle", "ElasticBuffer"],
    "from deep_ep.utils.event import EventHandle, EventOverlap": ["EventHandle", "EventOverlap"],
    "import deep_ep; Buffer = deep_ep.legacy.Buffer": ["Buffer"],
    "import deep_ep; ElasticBuffer = deep_ep.buffers.elastic.ElasticBuffer": ["ElasticBuffer"],
    "import deep_ep; EventOverlap = deep_ep.utils.event.EventOverlap": ["EventOverlap"],
}  # fmt: skip
ABSENT = [
    "from deep_ep import HybridEPBuffer",
    "from deep_ep.hybrid_ep_buffer import indices_to_map",
]

PROBE = """
import json, importlib.util, sys
statements, absent, install = json.loads(sys.argv[1])
if install:
    from deepcomm.compat import install_as_deep_ep
    install_as_deep_ep()
    install_as_deep_ep()
found = importlib.util.find_spec("deep_ep")
problems = [] if found is not None else ["find_spec finds no deep_ep"]
names = {}
for statement, expected in statements.items():
    scope = {}
    try:
        exec(statement, scope)
    except Exception as error:
        problems.append(f"{statement}: {error!r}")
    for name in expected:
        names.setdefault(name, scope.get(name))
        if names[name] is not scope.get(name) or names[name] is None:
            problems.append(f"{statement}: {name} is another object")
for statement in absent:
    try:
        exec(statement, {})
        problems.append(f"{statement}: succeeds")
    except ImportError:
        pass
import deep_ep, deepcomm.compat
if any(getattr(deepcomm.compat, name) is not value for name, value in names.items()):
    problems.append("deepcomm.compat has other objects")
if not hasattr(deep_ep, "ElasticBuffer") or not deep_ep.__version__.startswith("2."):
    problems.append("a probe for V2 fails")
import torch
if torch.cuda.is_initialized():
    problems.append("the import initialises CUDA")
print(json.dumps(problems))
"""


def run_python(code: str, *arguments: str, pythonpath: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("install", [False, True], ids=["pythonpath", "install_as_deep_ep"])
def test_import_statements_of_clients(install: bool) -> None:
    path = "" if install else compat.deep_ep_path()
    arguments = json.dumps([STATEMENTS, ABSENT, install])
    assert json.loads(run_python(PROBE, arguments, pythonpath=path)) == []


def test_import_with_global_symbols() -> None:
    code = (
        "import os, sys\n"
        "sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)\n"
        "import deep_ep\n"
        "from deepcomm._C import cpu\n"
        "print(deep_ep.Buffer.__name__)"
    )
    assert run_python(code, pythonpath=compat.deep_ep_path()).strip() == "Buffer"


def test_import_in_spawned_children() -> None:
    code = (
        "import multiprocessing, importlib.util\n"
        "if __name__ == '__main__':\n"
        "    from deepcomm.compat import install_as_deep_ep\n"
        "    install_as_deep_ep()\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(importlib.util.find_spec, ('deep_ep',)).origin)"
    )
    assert run_python(code).startswith(compat.deep_ep_path())


def test_command_prints_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deep-ep-path"]) == 0
    folder = capsys.readouterr().out.strip()
    assert folder == compat.deep_ep_path()
    assert {path.name for path in Path(folder).iterdir()} >= {"deep_ep", "deep_ep_cpp.py"}


def test_nothing_answers_to_deep_ep_unasked() -> None:
    spec = importlib.util.find_spec("deep_ep")
    assert spec is None or not str(spec.origin).startswith(compat.deep_ep_path())


def test_install_refuses_to_hide_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "deep_ep", types.ModuleType("deep_ep"))
    with pytest.raises(Error, match="before deep_ep is imported"):
        compat.install_as_deep_ep()
    assert compat.deep_ep_path() not in sys.path


def test_version_names_interface_and_package() -> None:
    interface, _, package = compat.DEEP_EP_VERSION.partition("+")
    assert interface == "2.1.0"
    assert package.startswith("deepcomm.")
