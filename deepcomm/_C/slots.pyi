# SPDX-License-Identifier: Apache-2.0
# Generated from the built extension by `python .ci/stub.py`; do not edit.
import collections.abc

def maker(type: type, names: collections.abc.Sequence[str], others: dict = ...) -> collections.abc.Callable: ...
