# SPDX-License-Identifier: Apache-2.0
"""``deepcomm compile``: fills the cache of kernels ahead of time, and reports what they take."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from deepcomm import jit
from deepcomm.backends.cuda.network_choice import loaded_nccl_headers
from deepcomm.cli.console import note, print_table, progress
from deepcomm.cli.environment import num_cores
from deepcomm.errors import Error, InvalidArgument

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

__all__ = ["add_parser"]

DEFAULT_ARCHS = "sm_90a,sm_100a"
MOST_PROCESSES = 16  # each takes half a GiB
USAGE_ERROR = 2
HEADER = ("kernel", "arch", "registers", "shared\nbytes", "stack\nbytes", "spill\nbytes", "threads")

Result: TypeAlias = jit.CompiledKernel | jit.CompileError


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to compile."""

    kernel: jit.Kernel
    arch: str
    spec: Mapping[str, int]

    @property
    def key(self) -> tuple[str, str]:
        """Which one it is."""
        return self.label, self.arch

    @property
    def label(self) -> str:
        """Name and compile-time choices."""
        choices = ", ".join(f"{name}={value}" for name, value in self.spec.items())
        return f"{self.kernel.name}<{choices}>" if choices else self.kernel.name

    def is_cached(self, compiler: jit.KernelCompiler, headers: jit.NcclHeaders | None) -> bool:
        """Return whether it has been compiled before."""
        return compiler.has(self.kernel, arch=self.arch, spec=self.spec, nccl=headers)

    def compile(self, compiler: jit.KernelCompiler, headers: jit.NcclHeaders | None) -> Result:
        """Compile it, unless it has been."""
        try:
            return compiler.compile(self.kernel, arch=self.arch, spec=self.spec, nccl=headers)
        except jit.CompileError as error:
            return error


def add_parser(commands: Any) -> None:
    """Add ``compile`` to the sub-commands."""
    parser = commands.add_parser(
        "compile",
        help="compile the kernels ahead of time, into the cache",
        description="Compiles every kernel with NVRTC, without a GPU, a driver or a CUDA toolkit, "
        "unless the cache has it. Ends with status 1 if a kernel does not compile.",
    )
    parser.add_argument(
        "--arch",
        default=DEFAULT_ARCHS,
        metavar="LIST",
        help="architectures, separated by commas (default %(default)s)",
    )
    parser.add_argument(
        "--hidden",
        metavar="LIST",
        help="hidden sizes, separated by commas, instead of the usual ones; concerns the kernels "
        "that are compiled for one",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="print registers, memory and spills of every kernel; a spill ends with status 1",
    )
    parser.add_argument(
        "--no-skips",
        action="store_true",
        help="end with status 1 if a kernel was left out, for lack of the headers that it includes",
    )
    parser.add_argument("--json", action="store_true", help="print the kernels as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    del argv
    start = time.perf_counter()
    try:
        jobs, nccl = _jobs(options), _find_nccl()
        compiler = jit.default_compiler()
        skipped = [job for job in jobs if job.kernel.uses_nccl and isinstance(nccl, str)]
        results = _compile(compiler, [job for job in jobs if job not in skipped], nccl)
    except InvalidArgument as error:
        note(f"deepcomm compile: {error}")
        return USAGE_ERROR
    except Error as error:
        note(f"deepcomm compile: {error}")
        return 1
    if options.json:
        print(json.dumps([_record(job, result) for job, result in results], indent=1))
    elif options.report:
        print_table(HEADER, [_row(job, result) for job, result in results])
    problems = _problems(results, options.report)
    skips = [f"{job.label} for {job.arch}: left out: {nccl}" for job in skipped]
    for skip in skips:
        note(skip)
    for problem in problems:
        note(problem)
    num_new = sum(isinstance(result, jit.CompiledKernel) and result.is_new for _, result in results)
    note(
        f"{len(results)} kernels, {num_new} compiled now, {len(skips)} left out, "
        f"problems {len(problems)}, "
        f"{time.perf_counter() - start:.1f} s, {compiler.toolchain.version}, "
        f"in {compiler.cache.folder}"
    )
    return int(bool(problems) or (options.no_skips and bool(skips)))


def _find_nccl() -> jit.NcclHeaders | str:
    """Return the headers of the NCCL that kernels would use, or why there are none."""
    try:
        return loaded_nccl_headers()
    except Error as error:
        return str(error)


def _jobs(options: argparse.Namespace) -> list[Job]:
    chosen = {"hidden": _hidden_sizes(options.hidden)} if options.hidden else {}
    return [
        Job(kernel, arch.strip(), spec)
        for kernel in jit.KERNELS
        for spec in jit.spec_grid(kernel, chosen)
        for arch in options.arch.split(",")
    ]


def _hidden_sizes(text: str) -> list[int]:
    values = text.split(",")
    if not all(value.strip().isdecimal() and int(value) > 0 for value in values):
        raise InvalidArgument(f"--hidden: expected sizes separated by commas, got {text!r}")
    return [int(value) for value in values]


def _compile(
    compiler: jit.KernelCompiler, jobs: Sequence[Job], nccl: jit.NcclHeaders | str
) -> list[tuple[Job, Result]]:
    """Compile all; a kernel's error becomes its result."""
    headers = None if isinstance(nccl, str) else nccl
    absent = [job for job in jobs if not job.is_cached(compiler, headers)]
    made = _compile_apart(absent, headers)
    return [(job, made.get(job.key) or job.compile(compiler, headers)) for job in jobs]


def _compile_apart(
    jobs: Sequence[Job], headers: jit.NcclHeaders | None
) -> dict[tuple[str, str], Result]:
    """Compile in processes: in one of them, NVRTC compiles one kernel at a time.

    Returns:
        What came of them by key; not all of it, where a process was killed.
    """
    num_processes = min(len(jobs), num_cores(), MOST_PROCESSES)
    made: dict[tuple[str, str], Result] = {}
    if num_processes < 2:
        return made
    title = f"compiling {len(jobs)} kernels in {num_processes} processes"
    context = multiprocessing.get_context("spawn")
    with (
        progress(title, len(jobs)) as advance,
        ProcessPoolExecutor(num_processes, mp_context=context) as pool,
    ):
        try:
            futures = {pool.submit(_compile_one, job, headers): job for job in jobs}
            for future in as_completed(futures):
                made[futures[future].key] = future.result()
                advance()
        except BrokenProcessPool as error:
            note(f"deepcomm compile: {error}; the rest is compiled one by one")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


def _compile_one(job: Job, headers: jit.NcclHeaders | None) -> Result:
    return job.compile(jit.default_compiler(), headers)


def _problems(results: Sequence[tuple[Job, Result]], is_report: bool) -> list[str]:
    """Return what makes the command fail, a message each."""
    problems = []
    for job, result in results:
        if isinstance(result, jit.CompileError):
            problems.append(str(result))
        elif is_report and result.usage is None:
            problems.append(f"{job.label} for {job.arch}: the compiler's report cannot be read")
        elif is_report and result.usage and result.usage.spill_bytes:
            spill_bytes = result.usage.spill_bytes
            problems.append(f"{job.label} for {job.arch}: spills {spill_bytes} bytes of registers")
    return problems


def _row(job: Job, result: Result) -> list[str]:
    if isinstance(result, jit.CompileError) or result.usage is None:
        return [job.label, job.arch, *["?"] * (len(HEADER) - 2)]
    usage = result.usage
    shared_bytes = usage.static_shared_bytes + result.shared_bytes
    figures = (usage.num_registers, shared_bytes, usage.stack_bytes, usage.spill_bytes)
    threads = "any" if result.max_threads is None else str(result.max_threads)
    return [job.label, job.arch, *map(str, figures), threads]


def _record(job: Job, result: Result) -> dict[str, Any]:
    record: dict[str, Any] = {"kernel": job.kernel.name, "arch": job.arch, "spec": dict(job.spec)}
    if isinstance(result, jit.CompileError):
        return {**record, "error": str(result)}
    return {
        **record,
        "compiled_now": result.is_new,
        "cubin_bytes": len(result.cubin),
        "shared_bytes": result.shared_bytes,
        "max_threads": result.max_threads,
        "usage": asdict(result.usage) if result.usage else None,
    }
