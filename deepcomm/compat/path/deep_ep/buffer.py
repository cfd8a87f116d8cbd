# SPDX-License-Identifier: Apache-2.0
"""Another way to the V1 interface."""

from deepcomm.compat import Buffer, Config

__all__ = ["Buffer", "Config"]
