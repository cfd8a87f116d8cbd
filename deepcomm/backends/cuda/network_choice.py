# SPDX-License-Identifier: Apache-2.0
"""Which network is between ranks: NCCL's device API where all of them have it, else its host's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from deepcomm import jit
from deepcomm._C import nccl
from deepcomm.backends.cuda.gin import Endpoint, GinNetwork
from deepcomm.backends.cuda.gin_facts import GinFacts, GinProperties
from deepcomm.backends.cuda.nccl import NcclNetwork, default_library, label_of, meet_nccl
from deepcomm.errors import NcclError, describe_error
from deepcomm.group import members_of, whole_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deepcomm._C import cuda
    from deepcomm.backends.cuda.device import CudaFunction, CudaRuntime
    from deepcomm.backends.cuda.nccl import NcclOptions
    from deepcomm.backends.cuda.network import Network
    from deepcomm.group import Group

__all__ = ["OLDEST_GIN", "gin_headers_of", "is_railed", "loaded_nccl_headers", "open_network"]

OLDEST_GIN: Final = (2, 30, 4)
AGENT: Final = "gin_move"

logger = logging.getLogger("deepcomm")
T = TypeVar("T")


class _NoGinError(Exception):
    """Some rank has no GIN; the message says which and why."""


@dataclass(frozen=True, slots=True)
class _Local:
    """What a rank finds alone."""

    agent: CudaFunction
    facts: GinFacts


def open_network(
    group: Group,
    runtime: CudaRuntime,
    device: cuda.Device,
    options: NcclOptions,
    kinds: Sequence[str],
    library: Callable[[], nccl.Library] = default_library,
) -> Network:
    """Return the first kind that all ranks have; collective.

    Args:
        group: The ranks.
        runtime: Of this rank; loads the agent.
        device: Likewise.
        options: How communicators are made.
        kinds: "gin", "nccl", the best one first.
        library: Finds the library; instead of this process's.

    Raises:
        NcclError: There is none, or NCCL failed.
        Error: As the constructors of the networks do.
    """
    why = ""
    if "gin" in kinds:
        try:
            return _open_gin(group, runtime, device, options, library)
        except _NoGinError as error:
            why = f"no GIN: {error}"
        if "nccl" not in kinds:
            raise NcclError(f"rail: expected 'gin' as asked, but there is {why}")
        logger.info("rail: %s", why)
    return NcclNetwork(group, device, runtime.raw_stream, options, library, why=why)


def loaded_nccl_headers() -> jit.NcclHeaders:
    """Return the headers of this process's NCCL.

    Raises:
        NcclError: There is no NCCL, or it is too old for kernels to use.
        HeadersMissing: Its headers are not there.
    """
    return gin_headers_of(default_library())


def gin_headers_of(library: nccl.Library) -> jit.NcclHeaders:
    """Return the headers of an NCCL that kernels can use; raises as ``loaded_nccl_headers``."""
    if tuple(map(int, library.version.split("."))) < OLDEST_GIN:
        oldest = ".".join(map(str, OLDEST_GIN))
        raise NcclError(f"expected NCCL {oldest} or newer, got {library.version}, {library.path}")
    return jit.find_nccl_headers(library.path, library.version)


def _open_gin(
    group: Group,
    runtime: CudaRuntime,
    device: cuda.Device,
    options: NcclOptions,
    find: Callable[[], nccl.Library],
) -> GinNetwork:
    """Return a network over GIN; collective.

    Raises:
        _NoGinError: Some rank of the whole group has none; on all of them.
        Error: As the constructor of ``NcclNetwork`` does.
    """
    local = _all_have(group, lambda: _look(runtime))
    library, communicator = meet_nccl(group, device, options, find)
    try:
        endpoint = _all_have(group, lambda: _ask(library, communicator, local.facts, options))
        return _all_have_made(
            group, lambda: GinNetwork(group, runtime, endpoint, local.agent, options.timeout_s)
        )
    except BaseException:
        communicator.abort()
        raise


def _look(runtime: CudaRuntime) -> _Local:
    agent = runtime.load(AGENT, {})
    return _Local(agent, GinFacts.of(agent.constants))


def _ask(
    library: nccl.Library,
    communicator: nccl.Communicator,
    facts: GinFacts,
    options: NcclOptions,
) -> Endpoint:
    """Make a device communicator, where NCCL has GIN between the ranks."""
    timeout_s = options.timeout_s
    device = nccl.DeviceCommunicator(communicator)
    properties = facts.read_properties(device.query(facts.properties, timeout_s))
    asked = facts.requirements(properties.num_ranks, is_railed=is_railed(properties))
    dev_comm = device.create(asked, facts.dev_comm_bytes, timeout_s)
    return Endpoint(communicator, device, dev_comm, label_of(library, options))


def is_railed(properties: GinProperties) -> bool:
    """Return whether connections along rails do: they do where each rank is alone in its LSA team.

    Raises:
        NcclError: There are no connections that do.
    """
    if not properties.has_device_api:
        raise NcclError(
            "expected NCCL's device API, got a communicator without (symmetric memory is off, or "
            "there is no GIN between its nodes); NCCL_DEBUG=INFO says more"
        )
    are_alone = properties.num_lsa_teams == properties.num_ranks
    if are_alone and properties.railed_gin_type != 0:
        return True
    if properties.gin_type != 0:
        return False
    raise NcclError(
        "expected GIN between the ranks, got type NONE (no plugin or NIC with it, or "
        "NCCL_GIN_ENABLE=0); NCCL_DEBUG=INFO says more"
    )


def _all_have(group: Group, produce: Callable[[], T]) -> T:
    """Return what each rank produces, unless one of the whole group cannot; collective.

    Raises:
        _NoGinError: One could not; on all of them.
    """
    made: list[T] = []
    reason = None
    try:
        made.append(produce())
    except Exception as error:  # noqa: BLE001  # the others wait for what this rank says
        reason = describe_error(error)
    for rank, theirs in enumerate(whole_of(group).all_gather(reason)):
        if theirs is not None:
            raise _NoGinError(f"rank {rank}: {theirs}")
    return made[0]


def _all_have_made(group: Group, make: Callable[[], GinNetwork]) -> GinNetwork:
    """Return a network that is made collectively, and that fails on all ranks or on none."""
    try:
        return make()
    except Exception as error:
        rank = members_of(group)[group.rank]
        raise _NoGinError(f"rank {rank}: {describe_error(error)}") from error
