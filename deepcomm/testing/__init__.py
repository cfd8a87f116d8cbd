# SPDX-License-Identifier: Apache-2.0
"""Tools to try and test expert parallelism: ranks as threads, payloads, oracles, workloads."""

from deepcomm.testing.local_cluster import LocalCluster, LocalGroup

__all__ = ["LocalCluster", "LocalGroup"]
