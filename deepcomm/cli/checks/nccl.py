# SPDX-License-Identifier: Apache-2.0
"""Check of NCCL, which carries rails between hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deepcomm.backends.cuda.nccl import default_library, probe_nccl
from deepcomm.backends.cuda.network_choice import gin_headers_of
from deepcomm.cli.checks.finding import Finding, Status
from deepcomm.cli.checks.gpu import absent
from deepcomm.errors import Error

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_gin", "check_nccl"]

SECTION = "cuda"
NAME = "NCCL"
FOUND = 'rail="nccl" can use it'
GIN_FOUND = 'rail="gin" where NCCL has GIN between the nodes (explain() says so)'
MISSING = 'no rail="nccl", so that nodes must be in one NVLink domain (rail="lsa")'
SECOND_REMEDY = (
    "have one libnccl: uninstall the other one, or take it out of LD_LIBRARY_PATH and LD_PRELOAD"
)


def check_nccl() -> Iterator[Finding]:
    """Say which libnccl would be used, whether torch has loaded it, and what follows for rails."""
    found = probe_nccl()
    if isinstance(found, str):
        yield absent(NAME, f"{MISSING}: {found}")
        return
    which = f"{found.version}, {found.path}"
    own = torch_version()
    if own is not None and (own != found.version or not found.was_loaded):
        detail = f"{which}, but torch uses another one, of version {own}"
        yield Finding(SECTION, NAME, Status.WARN, detail, SECOND_REMEDY)
        return
    origin = "torch has none" if own is None else "the one that torch has loaded"
    yield Finding(SECTION, NAME, Status.OK, f"{which} ({origin}): {FOUND}")


def check_gin() -> Iterator[Finding]:
    """Say whether kernels could use NCCL's device API; not whether a network has it."""
    name = "GIN"
    if isinstance(probe_nccl(), str):
        return
    try:
        headers = gin_headers_of(default_library())
    except Error as error:
        yield Finding(SECTION, name, Status.INFO, f'no rail="gin": {error}')
        return
    detail = f"headers of {headers.version} in {headers.folder}: {GIN_FOUND}"
    yield Finding(SECTION, name, Status.OK, detail)


def torch_version() -> str | None:
    """Return the version of the NCCL that torch uses, None for a torch without."""
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()[:3]))  # type: ignore[no-untyped-call]
