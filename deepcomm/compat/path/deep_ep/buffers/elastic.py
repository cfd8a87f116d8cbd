# SPDX-License-Identifier: Apache-2.0
"""Another way to the V2 interface."""

from deepcomm.compat import ElasticBuffer, EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
