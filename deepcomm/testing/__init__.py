# SPDX-License-Identifier: Apache-2.0
"""Tools to try and test expert parallelism: ranks as threads or processes, payloads, oracles."""

from deepcomm.testing.local_cluster import LocalCluster, LocalGroup
from deepcomm.testing.spawn import run_processes

__all__ = ["LocalCluster", "LocalGroup", "run_processes"]
