# SPDX-License-Identifier: Apache-2.0
"""Backends: one interface (``base``), chosen by device."""
