# SPDX-License-Identifier: Apache-2.0
"""What ranks do with the plugin, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from multinode.gin_loopback.player import ADD, HOST, INCREMENT, Failed, Player

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch.distributed as dist

SIZES = (0, 1, 8, 63, 64, 65, 4095, 4096, 4097, 70_001, 1 << 20)
BIG = 24 << 20


@contextlib.contextmanager
def playing(group: dist.ProcessGroup, memory_type: int) -> Iterator[Player]:
    player = Player(group, memory_type)
    yield player
    player.barrier()
    player.close()


def payload(source: int, destination: int, size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([source, destination, size]).integers(0, 256, size, np.uint8)


def put_all_sizes(group: dist.ProcessGroup, memory_type: int, sizes: tuple[int, ...]) -> None:
    """Send each size to each rank, itself too; data is there once its signal is."""
    with playing(group, memory_type) as player:
        room = sum(sizes)
        source, inbox = player.register(room * player.size), player.register(room * player.size)
        signals, words = player.register_signals(player.size)
        player.barrier()
        requests = []
        for peer in range(player.size):
            offset = 0
            for size in sizes:
                begin = peer * room + offset
                source.array[begin : begin + size] = payload(player.rank, peer, size)
                at = (inbox, player.rank * room + offset)
                requests.append(player.put(peer, (source, begin), at, size))
                offset += size
            requests.append(player.signal(peer, (signals, player.rank), 5))
        for peer in range(player.size):
            player.wait_until(lambda peer=peer: words[peer] == 5)
            parts = [payload(peer, player.rank, size) for size in sizes]
            got = inbox.array[peer * room : (peer + 1) * room]
            assert np.array_equal(got, np.concatenate(parts))
        player.wait(*requests, *(player.flush(peer, source) for peer in range(player.size)))


def signal_behind_puts(group: dist.ProcessGroup, memory_type: int, num_puts: int) -> None:
    """Watch a signal that counts puts: whatever it has counted is there."""
    with playing(group, memory_type) as player:
        slot = 1500
        source, inbox = player.register(num_puts * slot), player.register(num_puts * slot)
        signals, words = player.register_signals(2)
        source.array[:] = np.arange(num_puts * slot, dtype=np.uint32).astype(np.uint8) ^ 0x5A
        player.barrier()
        peer = (player.rank + 1) % player.size
        generator = np.random.default_rng(player.rank)
        requests = []
        for index in range(num_puts):
            size, at = int(generator.integers(slot)), index * slot
            requests.append(player.put(peer, (source, at), (inbox, at), size))
            rest = (at + size, slot - size)
            where = (signals, 1)
            requests.append(
                player.put_signal(peer, (source, rest[0]), (inbox, rest[0]), rest[1], where)
            )
        counted = 0
        while counted < num_puts:
            counted = int(words[1])
            expected = source.array[: counted * slot]
            assert np.array_equal(inbox.array[: counted * slot], expected), counted
        player.wait(*requests)


def change_signals(group: dist.ProcessGroup, memory_type: int) -> None:
    """All ranks change the same words of all others, in both ways; a word may be reset."""
    with playing(group, memory_type) as player:
        signals, words = player.register_signals(3)
        player.barrier()
        for repeat in range(1, 4):
            requests = []
            for peer in range(player.size):
                requests += [player.signal(peer, (signals, 0), 1 << 40) for _ in range(5)]
                requests += [player.signal(peer, (signals, 2), 99, INCREMENT) for _ in range(7)]
            player.wait_until(lambda: words[0] == (5 * player.size) << 40)
            player.wait_until(lambda repeat=repeat: words[2] == 7 * player.size * repeat)
            assert words[1] == 0
            player.wait(*requests)
            player.barrier()
            words[0] = 0
            player.barrier()


def put_inline(group: dist.ProcessGroup, memory_type: int) -> None:
    """Send values from memory of the host, which is reused once a request is done."""
    with playing(group, memory_type) as player:
        values, inbox = player.register(8, HOST), player.register(8 * 100 * player.size)
        signals, words = player.register_signals(1)
        player.barrier()
        for peer in range(player.size):
            for index in range(100):
                values.array.view(np.uint64)[0] = 1000 * player.rank + index
                at = (inbox, 8 * (100 * player.rank + index))
                player.wait(player.put_signal(peer, (values, 0), at, 8, (signals, 0)))
        player.wait_until(lambda: words[0] == 100 * player.size)
        expected = [1000 * rank + index for rank in range(player.size) for index in range(100)]
        assert inbox.array.view(np.uint64).tolist() == expected


def get_all_sizes(group: dist.ProcessGroup, memory_type: int, sizes: tuple[int, ...]) -> None:
    """Fetch each size from each rank, all under way at once, behind puts to the same ranks."""
    with playing(group, memory_type) as player:
        room = sum(sizes)
        shared, fetched = player.register(room), player.register(room * player.size)
        scratch = player.register(room * player.size)
        shared.array[:] = payload(player.rank, 0, room)
        player.barrier()
        requests = []
        for peer in range(player.size):
            requests.append(player.put(peer, (shared, 0), (scratch, player.rank * room), room))
            offset = 0
            for size in sizes:
                to = (fetched, peer * room + offset)
                requests.append(player.get(peer, (shared, offset), to, size))
                offset += size
        player.wait(*requests)
        expected = np.concatenate([payload(peer, 0, room) for peer in range(player.size)])
        assert np.array_equal(fetched.array, expected)
        player.barrier()
        assert np.array_equal(scratch.array, expected)


def register_late(group: dist.ProcessGroup, memory_type: int) -> None:
    """A put may arrive before its memory is registered: it waits."""
    with playing(group, memory_type) as player:
        signals, words = player.register_signals(1)
        if player.rank == 1:
            player.barrier()
            time.sleep(0.3)
        inbox = player.register(4096)
        if player.rank == 0:
            inbox.array[:] = 7
            request = player.put_signal(1, (inbox, 0), (inbox, 0), 4096, (signals, 0))
            player.barrier()
            player.wait(request)
        elif player.rank == 1:
            player.wait_until(lambda: words[0] == 1)
            assert (inbox.array == 7).all()
        else:
            player.barrier()


def lose_a_peer(group: dist.ProcessGroup, memory_type: int, how: str) -> float:
    """Rank 1 dies, closes or stalls; requests to it fail, those to rank 2 do not."""
    player = Player(group, memory_type)
    inbox, (signals, words) = player.register(BIG), player.register_signals(1)
    if player.rank == 1:
        player.stall()  # else it might do what it is asked for before it is gone
    player.barrier()
    if player.rank == 1:
        if how == "die":
            os._exit(3)
        if how == "close":
            player.close()
            return 0.0
        player.barrier()
        player.close()
        return 0.0
    begin = time.monotonic()
    peer = 2 if player.rank == 0 else 0
    requests = [
        player.put(1, (inbox, 0), (inbox, 0), BIG),
        player.get(1, (inbox, 0), (inbox, 0), 8),
        player.signal(1, (signals, 0), 1),
    ]
    player.wait(player.put_signal(peer, (inbox, 0), (inbox, 0), BIG, (signals, 0)))
    player.wait_until(lambda: words[0] == 1)
    for request in requests:
        with pytest.raises(Failed):
            player.wait(request)
    with pytest.raises(Failed):
        player.wait(player.signal(1, (signals, 0), 1))
    took = time.monotonic() - begin
    if how == "stall":
        player.barrier()
    player.close()
    return took


def leave_at_once(group: dist.ProcessGroup, memory_type: int) -> None:
    """End right after the last signal has come: the sender's requests are done nevertheless."""
    player = Player(group, memory_type)
    inbox, (signals, words) = player.register(1 << 20), player.register_signals(1)
    player.barrier()
    if player.rank == 0:
        requests = [
            player.put_signal(peer, (inbox, 0), (inbox, 0), 1 << 20, (signals, 0))
            for peer in range(1, player.size)
        ]
        time.sleep(0.5)  # they are gone by then
        player.wait(*requests)
    else:
        player.wait_until(lambda: words[0] == 1)
    player.close()


def put_outside(group: dist.ProcessGroup, memory_type: int) -> None:
    """The own memory's bounds, peers and operations are checked at once."""
    with playing(group, memory_type) as player:
        inbox, (signals, _) = player.register(64), player.register_signals(1)
        for source, size in ((0, 65), (65, 1), (1 << 63, 1 << 63)):
            with pytest.raises(AssertionError, match="put: 2"):
                player.put(0, (inbox, source), (inbox, 0), size)
        with pytest.raises(AssertionError, match="put: 2"):
            player.put(player.size, (inbox, 0), (inbox, 0), 1)
        with pytest.raises(AssertionError, match="put_signal: 2"):
            player.signal(0, (signals, 0), 1, ADD + 1)


def write_outside(group: dist.ProcessGroup, memory_type: int) -> bool:
    """Rank 0 writes past the end of rank 1's memory: rank 1's communicator has failed."""
    player = Player(group, memory_type)
    inbox = player.register(64)
    player.barrier()
    if player.rank == 0:
        with pytest.raises(Failed):
            player.wait(player.put(1, (inbox, 0), (inbox, 32), 64))
    else:
        player.wait_until(lambda: has_error(player))
    player.barrier()
    player.close()
    return player.rank == 1


def has_error(player: Player) -> bool:
    error = np.zeros(1, np.bool_)
    player.plugin.call("query_last_error", player.context, error.ctypes.data)
    return bool(error[0])
