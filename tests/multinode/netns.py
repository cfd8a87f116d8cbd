# SPDX-License-Identifier: Apache-2.0
"""Several nodes on one host: network and mount namespaces joined by a switch.

Every node has its own address, its own /dev/shm and its own view of its interface's counters.
A namespace lives as long as the process that holds it, and that as long as this one: nothing is
left behind, however a test ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from deepcomm.testing import run_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

INTERFACE = "eth0"
COUNTERS = Path(f"/sys/class/net/{INTERFACE}/statistics")
MASTER_PORT = "29500"
CLONE_NEWNS, CLONE_FS, CLONE_NEWNET = 0x00020000, 0x00000200, 0x40000000

HOLD_SWITCH = "ip link add br0 type bridge && ip link set br0 up && echo ready && exec cat"
HOLD_NODE = (
    "mount -t tmpfs -o size={shm_bytes} tmpfs /dev/shm && mount -t sysfs sysfs /sys && "
    "mount --bind {hosts} /etc/hosts && mount --bind /dev/null /etc/resolv.conf && "
    "ip link set lo up && echo ready && exec cat"
)


@dataclass(frozen=True)
class Node:
    """One node, by the process that holds its namespaces."""

    pid: int
    address: str

    def run(self, *command: str) -> str:
        """Run a command inside and return what it prints."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--mount", *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True).stdout

    def limit_rate(self, rate: str) -> None:
        """Send no faster than ``rate``, as in "20mbit"."""
        qdisc = ("root", "tbf", "rate", rate, "burst", "64kbit", "latency", "500ms")
        self.run("tc", "qdisc", "add", "dev", INTERFACE, *qdisc)

    def cut(self) -> None:
        """Take the interface down."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def leftovers(self) -> list[str]:
        """Return the names in the node's shared memory."""
        return self.run("ls", "-A", "/dev/shm").split()


@contextlib.contextmanager
def hold(script: str, *namespaces: str) -> Iterator[int]:
    """Keep a process in new namespaces that ends with the block, or with this process."""
    command = ["unshare", *namespaces, "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != b"ready\n":
                raise OSError(f"cannot make a node with {namespaces}: see above")
            yield holder.pid
        finally:
            holder.stdin.close()


@contextlib.contextmanager
def nodes_of(num_nodes: int, *, shm_bytes: int = 256 << 20) -> Iterator[list[Node]]:
    """Make nodes that reach each other over a switch."""
    addresses = [f"10.77.0.{index + 1}" for index in range(num_nodes)]
    with contextlib.ExitStack() as stack:
        hosts = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hosts"
        hosts.write_text("".join(f"{a} node{i}\n" for i, a in enumerate(addresses)))
        script = HOLD_NODE.format(shm_bytes=shm_bytes, hosts=hosts)
        switch = stack.enter_context(hold(HOLD_SWITCH, "--net", "--mount"))
        nodes = []
        for index, address in enumerate(addresses):
            pid = stack.enter_context(hold(script, "--net", "--mount"))
            nodes.append(Node(pid, address))
            plug_in(nodes[-1], switch, f"port{index}")
        yield nodes


def plug_in(node: Node, switch: int, port: str) -> None:
    veth = ("type", "veth", "peer", "name", port, "netns", str(switch))
    ip("link", "add", INTERFACE, "netns", str(node.pid), *veth)
    enter_switch = ("nsenter", "--target", str(switch), "--net")
    subprocess.run([*enter_switch, "ip", "link", "set", port, "master", "br0", "up"], check=True)
    node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
    node.run("ip", "link", "set", INTERFACE, "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def sent_bytes() -> int:
    """Return what this node's interface has sent."""
    return int((COUNTERS / "tx_bytes").read_text())


def received_bytes() -> int:
    """Return what this node's interface has received."""
    return int((COUNTERS / "rx_bytes").read_text())


# ---- ranks ----------------------------------------------------------------------------------


def run_on_nodes(
    nodes: list[Node],
    ranks_per_node: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Run ranks on the nodes, node by node; like ``run_processes``."""
    num_ranks = len(nodes) * ranks_per_node
    return run_processes(
        run_inside,
        num_ranks,
        nodes,
        ranks_per_node,
        function,
        args,
        timeout_s=timeout_s,
        may_die=may_die,
    )


def run_inside(
    group: dist.ProcessGroup,
    nodes: list[Node],
    ranks_per_node: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    """Move this rank to its node, and call ``function`` with a group made there."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    del group
    dist.destroy_process_group()
    enter(nodes[rank // ranks_per_node])
    os.environ.update(
        MASTER_ADDR=nodes[0].address, MASTER_PORT=MASTER_PORT, GLOO_SOCKET_IFNAME=INTERFACE
    )
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=30))
    return function(dist.group.WORLD, *args)


def enter(node: Node) -> None:
    """Move the calling thread, and those it will start, into the node."""
    libc = ctypes.CDLL(None, use_errno=True)
    check(libc.unshare(CLONE_FS))  # else other threads would have to move along
    for name, kind in (("net", CLONE_NEWNET), ("mnt", CLONE_NEWNS)):
        with Path(f"/proc/{node.pid}/ns/{name}").open() as namespace:
            check(libc.setns(namespace.fileno(), kind))


def check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
