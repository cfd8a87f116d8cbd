# SPDX-License-Identifier: Apache-2.0
"""Builds the emulated test programs: plain g++, objects cached by the hash of what they include.

The emulator itself is compiled as usual. Units with kernels are compiled with
``-fsanitize=thread``, whose hooks the emulator implements, so that plain accesses are checked; the
sanitizer's run time is never linked. Objects live in ``build/emulated`` of the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulated"
HEADERS = (HERE, HERE / "gin")
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"
COMPILER = "g++"
MAX_PARALLEL_COMPILES = 2
MAX_CACHED_BYTES = 200 << 20

BASE_FLAGS = (
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",  # device/emu/arithmetic.cuh rounds after every operation
)
HOOK_FLAGS = (
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    # Loops must not become calls of memset and memcpy, which no hook would see.
    "-fno-tree-loop-distribute-patterns",
)
KERNEL_FOLDERS = ("common", "layout", "device", "kernels", "emu")


@dataclass(frozen=True)
class Variant:
    """How to compile: what the program's kernels and the emulator are built with."""

    kernel_flags: tuple[str, ...] = ("-O1", *HOOK_FLAGS)
    emulator_flags: tuple[str, ...] = ("-O3",)  # joins of clocks want vectors
    includes: tuple[Path, ...] = (CSRC,)
    name: str = "plain"


PLAIN = Variant()
UNOPTIMISED = Variant(kernel_flags=("-O0", *HOOK_FLAGS), name="O0")
OPTIMISED = Variant(kernel_flags=("-O3", *HOOK_FLAGS), name="O3")
ADDRESS = Variant(
    kernel_flags=("-O1", "-fsanitize=address"),
    emulator_flags=("-O1", "-fsanitize=address"),
    name="address",
)


@dataclass(frozen=True)
class Result:
    """What a program printed for one case (see harness.cpp)."""

    case: str
    seeds: int
    failures: int
    trace_hash: str
    us_per_seed: float
    steps_per_seed: float
    max_now_ns: int
    threads: int
    notes: dict[str, int] = field(default_factory=dict)
    first_seed: int | None = None
    error: str = ""
    replay: str = ""

    def explain(self) -> str:
        """One message with all that is needed to look into the first failure."""
        return (
            f"{self.case}: {self.failures} of {self.seeds} seeds failed, first seed "
            f"{self.first_seed}: {self.error}\nreplay: {self.replay}"
        )


@dataclass(frozen=True)
class Program:
    """A built test program."""

    path: Path

    def cases(self) -> list[str]:
        return self._call("--list").split()

    def run(self, case: str, seeds: range, *options: str, no_aslr: bool = False) -> Result:
        """Run a case over consecutive seeds; any failing seed is in the result, not raised."""
        prefix = ("setarch", "-R") if no_aslr else ()
        window = f"{seeds.start}:{seeds.stop}"
        output = self._call(case, "--seeds", window, *options, prefix=prefix)
        values: dict[str, Any] = json.loads(output)
        return Result(**values)

    def _call(self, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
        command = [*prefix, str(self.path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr}")
        return done.stdout


def build(name: str, variant: Variant = PLAIN) -> Program:
    """Compile ``tests/emulated/<name>.cpp`` and link it with the harness and the emulator."""
    BUILD.mkdir(parents=True, exist_ok=True)
    emulator = [(path, variant.emulator_flags) for path in sorted((CSRC / "emu").glob("*.cpp"))]
    harness = [(HERE / "harness.cpp", variant.emulator_flags)]
    kernels = [(HERE / f"{name}.cpp", variant.kernel_flags)]
    includes = tuple(f"-I{path}" for path in (*variant.includes, *HEADERS))
    with ThreadPoolExecutor(MAX_PARALLEL_COMPILES) as pool:
        objects = list(
            pool.map(
                lambda unit: compile_unit(unit[0], (*BASE_FLAGS, *unit[1], *includes)),
                emulator + harness + kernels,
            )
        )
    sanitizer = ("-fsanitize=address",) if "-fsanitize=address" in variant.emulator_flags else ()
    key = digest([str(path) for path in objects])
    program = BUILD / f"{name}-{variant.name}-{key}"
    if not program.exists():
        run_compiler([*map(str, objects), *sanitizer], program)
    program.touch()
    return Program(program)


def build_library(name: str) -> Path:
    """Compile ``tests/emulated/<name>.cpp`` alone as a shared library: no fibers, no hooks."""
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = (*BASE_FLAGS, "-O1", "-fPIC", f"-I{CSRC}")
    return link_library(name, [compile_unit(HERE / f"{name}.cpp", flags)])


def build_emulator() -> Path:
    """Build the emulator as a library that kernels' libraries call (see runtime.py)."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((CSRC / "emu").glob("*.cpp")), HERE / "host_api.cpp"]
    flags = (*BASE_FLAGS, *PLAIN.emulator_flags, "-fPIC", f"-I{CSRC}", f"-I{HERE}")
    with ThreadPoolExecutor(MAX_PARALLEL_COMPILES) as pool:
        objects = list(pool.map(lambda source: compile_unit(source, flags), sources))
    return link_library("emulator", objects)


def build_kernel(name: str, text: str, variant: Variant = PLAIN) -> Path:
    """Build a unit with a kernel as a library whose emulator is loaded already."""
    source = BUILD / f"{name}-{digest([text])}.cpp"
    if not source.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        source.write_text(text)
    source.touch()
    includes = tuple(f"-I{path}" for path in (*variant.includes, *HEADERS))
    unit = compile_unit(source, (*BASE_FLAGS, *variant.kernel_flags, "-fPIC", *includes))
    return link_library(name, [unit])


def link_library(name: str, objects: list[Path]) -> Path:
    library = BUILD / f"{name}-{digest([str(path) for path in objects])}.so"
    if not library.exists():
        # Every kernel's library has its own copy of the device layer and calls that.
        run_compiler(["-shared", "-Wl,-Bsymbolic", *map(str, objects)], library)
    library.touch()
    return library


def prune() -> None:
    """Delete the objects and programs that were not used for longest, down to the cache's limit."""
    files = [path for path in BUILD.glob("*") if path.is_file()]
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MAX_CACHED_BYTES:
            path.unlink(missing_ok=True)


def compile_unit(source: Path, flags: tuple[str, ...]) -> Path:
    """Compile one unit unless an object of the same sources, flags and compiler exists."""
    key = digest([compiler_version(), *flags, source.read_text(), headers_digest(flags)])
    target = BUILD / f"{source.stem}-{key}.o"
    if not target.exists():
        run_compiler(["-c", str(source), *flags], target)
    target.touch()
    return target


def run_compiler(arguments: list[str], target: Path) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    command = [COMPILER, *arguments, "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)


def headers_digest(flags: tuple[str, ...]) -> str:
    """Hash of every header that a unit with these include folders may see."""
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    headers = [
        path
        for folder in folders
        for sub in (KERNEL_FOLDERS if folder not in HEADERS else (".",))
        for path in sorted((folder / sub).rglob("*.*h*"))
    ]
    return digest([text for path in headers for text in (path.name, path.read_text())])


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@cache
def compiler_version() -> str:
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    return done.stdout
