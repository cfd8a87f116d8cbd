# SPDX-License-Identifier: Apache-2.0
"""What a kernel takes of an SM, read from the assembler's report."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Usage", "parse_usage"]

REGISTERS = re.compile(r"\bUsed (\d+) registers")
STATIC_SHARED = re.compile(r"\bUsed .*?\b(\d+) bytes smem")
FRAME = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one kernel, with the functions that it calls.

    Attributes:
        num_registers: Registers a thread.
        static_shared_bytes: Static shared memory a block; the dynamic part is the launch's.
        stack_bytes: Local memory a thread: arrays indexed at run time, call frames, spills.
        spill_bytes: Bytes stored to and loaded from local memory for want of registers.
    """

    num_registers: int
    static_shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def parse_usage(log: str) -> Usage | None:
    """Read the report that ``--ptxas-options=-v`` gives for a unit with one kernel.

    Returns:
        None where the report is not of the known form.
    """
    registers = REGISTERS.findall(log)
    frames = [tuple(map(int, frame)) for frame in FRAME.findall(log)]
    if not registers or not frames:
        return None
    return Usage(
        num_registers=max(map(int, registers)),
        static_shared_bytes=sum(map(int, STATIC_SHARED.findall(log))),
        stack_bytes=sum(stack for stack, _, _ in frames),
        spill_bytes=sum(stores + loads for _, stores, loads in frames),
    )
