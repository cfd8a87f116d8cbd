# SPDX-License-Identifier: Apache-2.0
"""The arguments of the probes, as ``csrc/kernels/probe/params.hpp`` has them."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_uint32, c_uint64, c_void_p

MAX_RANKS = 8


class ProbeParams(Structure):
    _fields_ = [
        ("rank", c_int32),
        ("dst_rank", c_int32),
        ("src_rank", c_int32),
        ("num_rounds", c_int32),
        ("num_words", c_int32),
        ("timeout_ns", c_uint64),
        ("record", c_void_p),
    ]


class SignalParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("dst_payload", c_void_p),
        ("dst_signal", c_void_p),
        ("payload", c_void_p),
        ("signal", c_void_p),
        ("sums", c_void_p),
    ]


class ClaimParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("my_claims", c_void_p),
        ("peer_claims", c_void_p),
        ("owners", c_void_p),
    ]


class BulkPutParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("src", c_void_p),
        ("dst", c_void_p),
        ("dst_signal", c_void_p),
        ("received", c_void_p),
        ("signal", c_void_p),
        ("copy", c_void_p),
        ("num_tiles", c_int32),
    ]


class BulkCopyParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("src", c_void_p),
        ("dst", c_void_p),
        ("dst_signal", c_void_p),
        ("received", c_void_p),
        ("signal", c_void_p),
        ("copy", c_void_p),
        ("expected_signal", c_uint32),
        ("num_tiles", c_int32),
        ("tile_bytes", c_int32),
    ]


class RingParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("first_epoch", c_uint32),
        ("dst_slots", c_void_p),
        ("dst_tail", c_void_p),
        ("head", c_void_p),
        ("slots", c_void_p),
        ("tail", c_void_p),
        ("src_head", c_void_p),
        ("folds", c_void_p),
        ("num_slots", c_int32),
    ]


class BarrierFoldParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("accumulator", c_void_p),
        ("barrier_words", c_void_p * MAX_RANKS),
        ("grid_state", c_void_p),
        ("num_ranks", c_int32),
    ]


class PacketParams(Structure):
    _fields_ = [
        ("probe", ProbeParams),
        ("dst_packets", c_void_p),
        ("packets", c_void_p),
        ("sums", c_void_p),
        ("num_packets", c_int32),
    ]


ALL = (
    ProbeParams,
    SignalParams,
    ClaimParams,
    BulkPutParams,
    BulkCopyParams,
    RingParams,
    BarrierFoldParams,
    PacketParams,
)
