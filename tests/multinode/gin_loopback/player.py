# SPDX-License-Identifier: Apache-2.0
"""Calls the plugin as NCCL does: one thread asks for progress all the time, others do the rest."""

from __future__ import annotations

import ctypes
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from multinode.gin_loopback import library

if TYPE_CHECKING:
    from collections.abc import Callable

HANDLE_BYTES = 128
HOST, DEVICE = 1, 2
INCREMENT, ADD = 1, 2
REMOTE_ERROR = 6
DEADLINE_S = 40.0

_pointer, _u64, _u32, _int = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
_place = (_u64, _pointer)  # an offset and registered memory

# Names and parameters in the struct's order; all return a code.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "init": (_pointer, _u64, _pointer),
    "devices": (_pointer,),
    "get_properties": (_int, _pointer),
    "listen": (_pointer, _int, _pointer, _pointer),
    "connect": (_pointer, _pointer, _int, _int, _pointer, _pointer),
    "create_context": (_pointer, _pointer, _pointer, _pointer),
    "register": (_pointer, _pointer, ctypes.c_size_t, _int, _u64, _pointer, _pointer),
    "register_dma_buf": (
        *(_pointer, _pointer, ctypes.c_size_t, _int, _u64, _int, _u64, _pointer, _pointer),
    ),
    "deregister": (_pointer, _pointer),
    "destroy_context": (_pointer,),
    "close_comm": (_pointer,),
    "close_listener": (_pointer,),
    "put": (_pointer, _int, *_place, ctypes.c_size_t, *_place, _u32, _pointer),
    "put_signal": (
        *(_pointer, _int, *_place, ctypes.c_size_t, *_place, _u32, *_place, _u64, _u32, _pointer),
    ),
    "get": (_pointer, _int, *_place, ctypes.c_size_t, *_place, _u32, _pointer),
    "flush": (_pointer, _int, _pointer, _u32, _pointer),
    "test": (_pointer, _pointer, _pointer),
    "progress": (_pointer,),
    "query_last_error": (_pointer, _pointer),
    "finalize": (_pointer,),
}


class Plugin:
    """The functions of an exported struct."""

    def __init__(self, symbol: str = "ncclRmaPlugin_v13") -> None:
        self._library = ctypes.CDLL(str(library.plugin()))
        words = (ctypes.c_void_p * (1 + len(FUNCTIONS))).in_dll(self._library, symbol)
        self.name = ctypes.string_at(words[0] or 0).decode()
        self._functions = {
            name: ctypes.CFUNCTYPE(_int, *parameters)(words[1 + index] or 0)
            for index, (name, parameters) in enumerate(FUNCTIONS.items())
        }

    def code(self, name: str, *arguments: Any) -> int:
        return int(self._functions[name](*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        code = self.code(name, *arguments)
        assert code == 0, f"{name}: {code}"

    def make(self, name: str, *arguments: Any) -> int:
        """Call what returns a pointer as its last parameter."""
        made = ctypes.c_void_p()
        self.call(name, *arguments, ctypes.byref(made))
        return made.value or 0


@dataclass(frozen=True)
class Memory:
    """Registered memory, the same on all ranks but for its content."""

    array: np.ndarray[Any, Any]
    handle: int


class Failed(Exception):
    """A request that failed because of a peer."""


class Player:
    """One rank. ``memory_type`` is that of all memory but inline values."""

    def __init__(self, group: dist.ProcessGroup, memory_type: int) -> None:
        self.group, self.memory_type = group, memory_type
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.plugin = Plugin()
        self.comm = self._connect()
        config, handle = (ctypes.c_int * 5)(8, 0, 2, 0, 0), ctypes.c_void_p()
        context = ctypes.c_void_p()
        self.plugin.call(
            "create_context", self.comm, config, ctypes.byref(context), ctypes.byref(handle)
        )
        self.context = context.value
        self._registered: list[Memory] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._progress, daemon=True)
        self._thread.start()

    def _connect(self) -> int:
        instance = ctypes.c_void_p()
        self.plugin.call("init", ctypes.byref(instance), 77, None)
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        listener = self.plugin.make("listen", instance, 0, handle)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, handle.raw, group=self.group)
        buffers = [ctypes.create_string_buffer(raw, HANDLE_BYTES) for raw in everyone]
        addresses = (ctypes.c_void_p * self.size)(*[ctypes.addressof(buffer) for buffer in buffers])
        comm = self.plugin.make("connect", instance, addresses, self.size, self.rank, listener)
        self.plugin.call("close_listener", listener)
        return comm

    def _progress(self) -> None:
        while not self._stop.is_set():
            self.plugin.code("progress", self.context)

    def register(self, num_bytes: int, memory_type: int | None = None) -> Memory:
        array = np.full(num_bytes, 0xEE, np.uint8)
        handle, device_handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.plugin.call(
            *("register", self.comm, array.ctypes.data, num_bytes),
            *(memory_type or self.memory_type, 1),
            *(ctypes.byref(handle), ctypes.byref(device_handle)),
        )
        assert handle.value == device_handle.value
        memory = Memory(array, handle.value or 0)
        self._registered.append(memory)
        return memory

    def register_signals(self, num_words: int) -> tuple[Memory, np.ndarray[Any, Any]]:
        memory = self.register(8 * num_words)
        memory.array[:] = 0
        return memory, memory.array.view(np.uint64)

    def put(self, peer: int, source: tuple[Memory, int], to: tuple[Memory, int], size: int) -> int:
        (src, src_offset), (dst, dst_offset) = source, to
        places = (src_offset, src.handle, size, dst_offset, dst.handle)
        return self.plugin.make("put", self.context, 0, *places, peer)

    def signal(self, peer: int, word: tuple[Memory, int], value: int, operation: int = ADD) -> int:
        memory, index = word
        nothing = (0, None, 0, 0, None)
        where = (8 * index, memory.handle, value, operation)
        return self.plugin.make("put_signal", self.context, 1, *nothing, peer, *where)

    def put_signal(
        self,
        peer: int,
        source: tuple[Memory, int],
        to: tuple[Memory, int],
        size: int,
        word: tuple[Memory, int],
    ) -> int:
        (src, src_offset), (dst, dst_offset), (memory, index) = source, to, word
        places = (src_offset, src.handle, size, dst_offset, dst.handle)
        where = (8 * index, memory.handle, 1, INCREMENT)
        return self.plugin.make("put_signal", self.context, 0, *places, peer, *where)

    def get(self, peer: int, remote: tuple[Memory, int], to: tuple[Memory, int], size: int) -> int:
        (src, src_offset), (dst, dst_offset) = remote, to
        places = (src_offset, src.handle, size, dst_offset, dst.handle)
        return self.plugin.make("get", self.context, 0, *places, peer)

    def flush(self, peer: int, memory: Memory) -> int:
        return self.plugin.make("flush", self.context, 0, memory.handle, peer)

    def wait(self, *requests: int, deadline_s: float = DEADLINE_S) -> None:
        """Wait until requests are done; raises Failed for the first that fails."""
        for request in requests:
            until = time.monotonic() + deadline_s
            done = ctypes.c_int()
            while not done.value:
                code = self.plugin.code("test", self.comm, request, ctypes.byref(done))
                if code:
                    assert code == REMOTE_ERROR
                    raise Failed
                assert time.monotonic() < until, "a request that does not end"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < until, "a condition that never holds"
            time.sleep(0)

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def stall(self) -> None:
        """Ask for no more progress."""
        self._stop.set()
        self._thread.join()

    def close(self) -> None:
        """End as NCCL does: progress first, then the context, its memory, the communicator."""
        self.stall()
        self.plugin.call("destroy_context", self.context)
        for memory in self._registered:
            self.plugin.call("deregister", self.comm, memory.handle)
        self.plugin.call("close_comm", self.comm)
        self.plugin.call("finalize", None)
