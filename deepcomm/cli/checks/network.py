# SPDX-License-Identifier: Apache-2.0
"""Checks of network interfaces and of the gloo transport between nodes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from deepcomm.cli.checks.finding import Finding, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_gloo", "check_interfaces"]

INTERFACES = Path("/sys/class/net")
RDMA_DEVICES = Path("/sys/class/infiniband")
GLOO_TIMEOUT_S = 20
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def check_interfaces() -> Iterator[Finding]:
    """List the interfaces, and check that the variables that choose one name one."""
    section = "network"
    names = [name for _, name in socket.if_nameindex()]
    described = ", ".join(_describe(name) for name in names)
    yield Finding(section, "interfaces", Status.OK if names else Status.WARN, described or "none")
    rdma = sorted(path.name for path in RDMA_DEVICES.iterdir()) if RDMA_DEVICES.is_dir() else []
    detail = ", ".join(rdma) or "none (nodes then talk over TCP)"
    yield Finding(section, "RDMA devices", Status.OK if rdma else Status.INFO, detail)
    for variable in INTERFACE_VARIABLES:
        value = os.environ.get(variable)
        if value is not None:
            yield _interface_variable(section, variable, value, names)


def _describe(name: str) -> str:
    state = _read(INTERFACES / name / "operstate")
    speed = _read(INTERFACES / name / "speed")
    known = [state if state != "unknown" else "", f"{speed} Mbit/s" if _positive(speed) else ""]
    facts = " ".join(fact for fact in known if fact)
    return f"{name} ({facts})" if facts else name


def _interface_variable(section: str, variable: str, value: str, names: list[str]) -> Finding:
    # NCCL takes a list of prefixes, "=" before an exact name and "^" before a list to leave out.
    wanted = [part.strip() for part in value.lstrip("^=").split(",")]
    missing = [part for part in wanted if not any(name.startswith(part) for name in names)]
    if missing and not value.startswith("^"):
        detail = f"{value}: no interface {', '.join(missing)}"
        return Finding(section, variable, Status.FAIL, detail, f"unset {variable}, or name another")
    return Finding(section, variable, Status.OK, value)


def check_gloo() -> Iterator[Finding]:
    """Create a gloo process group of one rank, which binds to an interface."""
    import torch.distributed as dist

    section, name = "network", "gloo"
    if not dist.is_available() or not dist.is_gloo_available():
        remedy = "install a torch built with gloo (the wheels are)"
        yield Finding(section, name, Status.FAIL, "this torch has no gloo", remedy)
        return
    try:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=GLOO_TIMEOUT_S))
    except RuntimeError as error:
        remedy = "set GLOO_SOCKET_IFNAME to an interface of the list above (lo on a single host)"
        yield Finding(section, name, Status.FAIL, str(error).splitlines()[0], remedy)
        return
    yield Finding(section, name, Status.OK, "available")
    address = _own_address()
    if address is None or address.startswith("127."):
        detail = f"the host's name resolves to {address or 'nothing'}: other hosts cannot connect"
        remedy = "for several hosts set GLOO_SOCKET_IFNAME to the interface they reach"
        yield Finding(section, "host name", Status.INFO, detail, remedy)


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _positive(text: str) -> bool:
    return text.isdigit() and int(text) > 0
