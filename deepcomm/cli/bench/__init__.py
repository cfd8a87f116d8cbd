# SPDX-License-Identifier: Apache-2.0
"""``deepcomm bench``: check that dispatch and combine are right, then measure them.

``args`` parses, ``launch`` starts the ranks, ``worker`` is the program of one rank: for each number
of tokens it builds a ``workload``, lists our ``operations`` and their ``opponents`` (the
``baseline`` and plain copies), lets ``verify`` check and ``measure`` time them; ``figures``
compares them, ``report`` and ``plot`` show that.
"""

from deepcomm.cli.bench.args import add_parser

__all__ = ["add_parser"]
