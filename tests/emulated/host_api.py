# SPDX-License-Identifier: Apache-2.0
"""The C interface of host_api.cpp, which runs kernels of a small cluster on the emulator."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache

from emulated.build import build_emulator

NEVER = (1 << 64) - 1
HOST_RANK = -1
WAIT_NONE, WAIT_STREAM, WAIT_WORD = range(3)


class KernelArguments(Structure):
    """Arguments of a kernel of the tests' own, as ``Runtime.launch`` takes them."""

    @property
    def address(self) -> int:
        return ctypes.addressof(self)

    @property
    def num_bytes(self) -> int:
        return ctypes.sizeof(self)


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a run, in virtual nanoseconds; see csrc/emu/cluster.hpp."""

    stop_rank: int = -1
    stop_at_ns: int = 0
    delay_rank: int = -1
    delay_from_ns: int = 0
    delay_for_ns: int = 0
    slow_src: int = -1
    slow_dst: int = -1
    slow_extra_ns: int = 0


class CFaults(Structure):
    _fields_ = [
        ("stop_rank", c_int),
        ("stop_at_ns", c_uint64),
        ("delay_rank", c_int),
        ("delay_from_ns", c_uint64),
        ("delay_for_ns", c_uint64),
        ("slow_src", c_int),
        ("slow_dst", c_int),
        ("slow_extra_ns", c_uint64),
    ]


class COptions(Structure):
    _fields_ = [
        ("faults", CFaults),
        ("trace", c_bool),
        ("allow_foreign", c_bool),
        ("num_devices", c_int),
        ("max_steps", c_uint64),
        ("max_idle_steps", c_uint64),
    ]


class CLaunch(Structure):
    _fields_ = [
        ("grid", c_int),
        ("block", c_int),
        ("smem_bytes", c_size_t),
        ("kernel", c_void_p),
        ("params", c_void_p),
        ("num_bytes", c_size_t),
    ]


class CHostWait(Structure):
    _fields_ = [
        ("kind", c_int),
        ("word", c_void_p),
        ("expected", c_uint64),
        ("flag", c_void_p),
        ("flag_value", c_uint32),
        ("deadline_ns", c_uint64),
    ]


class Statistics(Structure):
    _fields_ = [
        ("steps", c_uint64),
        ("switches", c_uint64),
        ("now_ns", c_uint64),
        ("trace_hash", c_uint64),
        ("num_threads", c_int),
    ]


@dataclass(frozen=True)
class HostApi:
    """The loaded library, twice: calls that are short keep the interpreter's lock."""

    short: ctypes.PyDLL
    run: ctypes.CDLL


@cache
def host_api() -> HostApi:
    """Build and load the emulator, for this process and for kernels' libraries."""
    path = str(build_emulator())
    api = HostApi(ctypes.PyDLL(path, ctypes.RTLD_GLOBAL), ctypes.CDLL(path, ctypes.RTLD_GLOBAL))
    signatures = {
        "deepcomm_open": ([c_int, c_uint64, POINTER(COptions)], None),
        "deepcomm_alloc": ([c_int, ctypes.c_char_p, c_size_t, POINTER(c_void_p)], ctypes.c_char_p),
        "deepcomm_free": ([c_void_p], None),
        "deepcomm_launch": ([c_int, POINTER(CLaunch)], None),
        "deepcomm_set_mutant": ([c_int], None),
        "deepcomm_observe": ([c_int, POINTER(CHostWait)], ctypes.c_char_p),
        "deepcomm_host_read": ([c_int, c_void_p, c_size_t], ctypes.c_char_p),
        "deepcomm_statistics": ([POINTER(Statistics)], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(api.short, name)
        function.argtypes, function.restype = arguments, result
    api.run.deepcomm_run.argtypes = [POINTER(CHostWait), POINTER(c_char)]
    api.run.deepcomm_run.restype = ctypes.c_char_p
    return api
