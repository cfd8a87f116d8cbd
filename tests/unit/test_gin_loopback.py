# SPDX-License-Identifier: Apache-2.0
"""The network between GPUs of one host that NCCL's GIN proxy is tested with, without a GPU.

Its memory is the host's, or as if on a GPU: then by a driver whose copies happen late.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import pytest
from multinode.gin_loopback import library, ranks
from multinode.gin_loopback.player import DEVICE, HOST, Plugin

from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL_RING, USUAL_RING = 1 << 15, 1 << 20

memory_types = pytest.mark.parametrize(
    "memory_type", [pytest.param(HOST, id="host"), pytest.param(DEVICE, id="device")]
)


class Host:
    """Runs processes whose rings are files of a folder, of which none may be left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(
        self,
        function: Callable[..., Any],
        num_ranks: int,
        *args: Any,
        ring_bytes: int = SMALL_RING,
        timeout_s: int = 60,
        may_die: tuple[int, ...] = (),
    ) -> list[Any]:
        environment = {
            **library.environment(self._folder),
            "DEEPCOMM_LOOPBACK_CUDA": str(library.late_driver()),
            "DEEPCOMM_LOOPBACK_RING_BYTES": str(ring_bytes),
            "DEEPCOMM_LOOPBACK_TIMEOUT_S": str(timeout_s),
        }
        library.plugin()
        results = run_processes(
            *(function, num_ranks, *args), env=[environment] * num_ranks, may_die=may_die
        )
        assert list(self._folder.iterdir()) == []
        return results


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("symbol", ["ncclRmaPlugin_v13", "ncclGinPlugin_v13"])
def test_gin_loopback_says_what_nccl_asks(symbol: str) -> None:
    plugin = Plugin(symbol)
    assert plugin.name == "deepcomm_loopback"
    count, properties = ctypes.c_int(), (ctypes.c_int * 32)()
    plugin.call("devices", ctypes.byref(count))
    plugin.call("get_properties", 0, properties)
    assert count.value == 1
    # pointer types, most receives in one request, type and number of virtual devices
    assert [properties[index] for index in (6, 13, 14, 16)] == [HOST | DEVICE, 1, 2, 1]


@memory_types
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_gin_loopback_puts_all_sizes(host: Host, memory_type: int, num_ranks: int) -> None:
    host.run(ranks.put_all_sizes, num_ranks, memory_type, ranks.SIZES)


@memory_types
def test_gin_loopback_puts_tens_of_megabytes(host: Host, memory_type: int) -> None:
    sizes = (ranks.BIG, 3, ranks.BIG + 1)
    host.run(ranks.put_all_sizes, 2, memory_type, sizes, ring_bytes=USUAL_RING)


@memory_types
def test_gin_loopback_signals_behind_puts(host: Host, memory_type: int) -> None:
    host.run(ranks.signal_behind_puts, 3, memory_type, 400)


@memory_types
def test_gin_loopback_changes_signals(host: Host, memory_type: int) -> None:
    host.run(ranks.change_signals, 3, memory_type)


@memory_types
def test_gin_loopback_puts_inline(host: Host, memory_type: int) -> None:
    host.run(ranks.put_inline, 2, memory_type)


@memory_types
def test_gin_loopback_gets_all_sizes(host: Host, memory_type: int) -> None:
    host.run(ranks.get_all_sizes, 3, memory_type, ranks.SIZES)


@memory_types
def test_gin_loopback_waits_for_memory(host: Host, memory_type: int) -> None:
    host.run(ranks.register_late, 2, memory_type)


@memory_types
@pytest.mark.parametrize("how", ["die", "close"])
def test_gin_loopback_fails_when_a_peer_is_gone(host: Host, memory_type: int, how: str) -> None:
    may_die = (1,) if how == "die" else ()
    took = host.run(ranks.lose_a_peer, 3, memory_type, how, may_die=may_die)
    assert max(took[0], took[2]) < 20  # long before the time that a peer may take


@memory_types
def test_gin_loopback_fails_when_a_peer_does_not_go_on(host: Host, memory_type: int) -> None:
    took = host.run(ranks.lose_a_peer, 3, memory_type, "stall", timeout_s=2)
    assert 2 <= took[0] < 20


@memory_types
def test_gin_loopback_lets_go_before_it_ends(host: Host, memory_type: int) -> None:
    host.run(ranks.leave_at_once, 3, memory_type)


@memory_types
def test_gin_loopback_refuses_places_outside(host: Host, memory_type: int) -> None:
    host.run(ranks.put_outside, 2, memory_type)


@memory_types
def test_gin_loopback_fails_for_what_is_written_outside(host: Host, memory_type: int) -> None:
    assert host.run(ranks.write_outside, 2, memory_type, timeout_s=2) == [False, True]
