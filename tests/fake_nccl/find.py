# SPDX-License-Identifier: Apache-2.0
"""Prints which library is found: ``find.py EXTENSION PATH LOADED...``, once LOADED are loaded.

The extension is imported by itself: torch, which deepcomm imports, may bring an NCCL along.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys

if __name__ == "__main__":
    extension, path, *loaded = sys.argv[1:]
    for library in loaded:
        ctypes.CDLL(library)
    spec = importlib.util.spec_from_file_location("_C", extension)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.nccl.Library.find(path)
    json.dump([found.path, found.version, found.was_loaded], sys.stdout)
