# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: host code of the kernels' operations, on a GPU or on the SIMT emulator."""
