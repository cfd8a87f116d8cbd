# SPDX-License-Identifier: Apache-2.0
"""The GPUs of a ``LocalCluster``: which rank is where, its stream, and what the driver must know.

Kernels of ranks that share a device wait for each other, so they must run at the same time: each
rank has a stream of its own, streams must not share a hardware queue, and no kernel may have to be
loaded while another one waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Final

import torch

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["current_device", "place_ranks", "prepare_environment"]

LOG = logging.getLogger("deepcomm")

# Read by the driver when it makes a context, so they cannot be set later.
ENVIRONMENT: Final = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # hardware queues; the default of 8 makes streams share
    "CUDA_MODULE_LOADING": "EAGER",  # to load a kernel lazily may wait for those that run
}


def place_ranks(
    device: torch.device | str | None, num_ranks: int
) -> tuple[torch.device | None, ...]:
    """Return each rank's GPU, None for ranks without one.

    Args:
        device: Of all ranks; "cuda", or None where there are GPUs: rank i on GPU i, starting again
            where there are more ranks than GPUs.
        num_ranks: R.

    Raises:
        InvalidArgument: The device is neither a CPU nor a GPU that is there.
    """
    kind = torch.device(device or ("cuda" if torch.version.cuda else "cpu"))
    if kind.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device: expected cpu or cuda, got {kind}")
    if kind.type == "cpu":
        return (None,) * num_ranks
    added = prepare_environment()  # before torch is asked: it may make a context
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None and count == 0:
        return (None,) * num_ranks
    if count == 0 or (kind.index or 0) >= count:
        raise InvalidArgument(f"device: expected one of torch's {count} CUDA devices, got {kind}")
    places = tuple(
        torch.device("cuda", rank % count if kind.index is None else kind.index)
        for rank in range(num_ranks)
    )
    check_contexts({place.index for place in places}, added)
    return places


def prepare_environment() -> set[str]:
    """Set the variables that are not set, and return their names."""
    added = ENVIRONMENT.keys() - os.environ.keys()
    for name in added:
        os.environ[name] = ENVIRONMENT[name]
    return added


def check_contexts(devices: set[int], added: set[str]) -> None:
    """Warn, and take additions back, where a context exists that was made without them."""
    from deepcomm.backends.cuda.driver import default_driver

    driver = default_driver()
    late = sorted(device for device in devices if driver.has_context(device))
    for name, wanted in ENVIRONMENT.items():
        if late and name in added:
            del os.environ[name]
        value = os.environ.get(name, "unset")
        if value != wanted:
            state = f"cuda:{late[0]} is in use already" if late else "set by somebody else"
            LOG.warning(
                "LocalCluster: %s is %s (%s): ranks that share a device may wait for each other's "
                "kernels until they time out; set it to %s before CUDA is first used",
                *(name, value, state, wanted),
            )


@contextlib.contextmanager
def current_device(device: torch.device | None) -> Iterator[None]:
    """Let this thread use a rank's device, and a stream that no other rank has."""
    if device is None:
        yield
        return
    from deepcomm.backends.cuda.driver import stream_pool, wrap_stream

    torch.cuda.set_device(device)
    pool = stream_pool()
    handle = pool.take(device.index, 0)
    stream = wrap_stream(handle, device.index)
    try:
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()  # the next one to have it, and the caller, find the work done
    finally:
        pool.give_back(device.index, 0, handle)
