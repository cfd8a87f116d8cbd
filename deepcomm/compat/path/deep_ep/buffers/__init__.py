# SPDX-License-Identifier: Apache-2.0
"""Another way to both interfaces."""

from deepcomm.compat import Buffer, ElasticBuffer, EPHandle

from . import elastic, legacy

__all__ = ["Buffer", "EPHandle", "ElasticBuffer", "elastic", "legacy"]
