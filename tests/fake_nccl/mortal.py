# SPDX-License-Identifier: Apache-2.0
"""A rank 1 of two, in a process of its own, that dies once it is met: ``mortal.py LIBRARY ID``."""

from __future__ import annotations

import os
import signal
import sys

from fake_cuda.library import FakeCuda

from deepcomm._C import cuda, nccl

if __name__ == "__main__":
    library = nccl.Library.open(sys.argv[1])
    config = nccl.CommunicatorConfig("rank 1", 1, 2, bytes.fromhex(sys.argv[2]))
    device = cuda.Device(FakeCuda().driver(), 0)
    communicator = nccl.Communicator(device, library, config, 30.0)
    os.kill(os.getpid(), signal.SIGKILL)
