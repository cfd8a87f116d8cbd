# SPDX-License-Identifier: Apache-2.0
# Generated from the built extension by `python .ci/stub.py`; do not edit.
import collections.abc
import deepcomm._C.cuda
import torch
import typing
from typing import overload

GIN_MOST_SPANS: int
GIN_MOST_WINDOWS: int
GIN_PEER_BYTES: int
GIN_PUT_BYTES: int
LOW_LATENCY_SEND_UNIT: int
LOW_LATENCY_STATE_BYTES: int
LOW_LATENCY_STATUS_BYTES: int
MAX_LOW_LATENCY_EXPERTS: int
MAX_LOW_LATENCY_HIDDEN: int
MAX_LOW_LATENCY_RANKS: int
MAX_LOW_LATENCY_TOKEN_WORDS: int
RAIL_STATE_BYTES: int
VERDICT_BYTES: int

class CombineOpenParams:
    meet: MeetParams
    node_made: int
    num_tokens: int
    rail_made: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class CombineParams:
    meet: MeetParams
    num_tokens: int
    num_topk: int
    table: RoutingTable
    topk_weights: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def outputs(self) -> ExpertOutputs: ...
    @property
    def rail(self) -> RailTarget: ...
    @property
    def target(self) -> CombineTarget: ...

class CombineTarget:
    bias: int
    bias_stride: int
    out: int
    own_sums: int
    topk_weights: int
    def __init__(self, *args, **kwargs) -> None: ...

class CommParams:
    bases: int
    failed: int
    num_ranks: int
    rank: int
    record: int
    timeout_ns: int
    def __init__(self, *args, **kwargs) -> None: ...

class CountParams:
    counts: int
    ids_are_64: int
    lost: int
    meet: MeetParams
    num_recv: int
    num_tokens: int
    num_topk: int
    offsets: int
    overflow: int
    partials: int
    recv_layout: int
    report: int
    report_tag: int
    table: RoutingTable
    tokens_from: int
    topk_idx: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class ExchangeLayout:
    def __init__(self, *args, **kwargs) -> None: ...
    @staticmethod
    def make(shape: ExchangeShape) -> ExchangeLayout: ...
    @staticmethod
    def make_mirror(shape: ExchangeShape) -> ExchangeLayout: ...
    @property
    def areas(self) -> RowAreas: ...
    @property
    def shape(self) -> ExchangeShape: ...
    @property
    def total_bytes(self) -> int: ...

class ExchangeShape:
    hidden: int
    max_tokens: int
    num_experts: int
    num_generations: int
    num_origins: int
    num_ranks: int
    num_topk: int
    def __init__(self) -> None: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def num_counters(self) -> int: ...

class ExpertOutputs:
    carried: int
    own_sums: int
    row_slots: int
    row_stride: int
    row_weights: int
    rows: int
    def __init__(self, *args, **kwargs) -> None: ...

class ExpertTarget:
    row_slots: int
    row_weights: int
    rows: int
    scales: int
    topk_weights: int
    def __init__(self, *args, **kwargs) -> None: ...

class GinParams:
    control: int
    dev_comm: int
    done: int
    num_peers: int
    number: int
    peers: int
    windows: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    def set_comm(self, rank: typing.SupportsInt | typing.SupportsIndex, num_ranks: typing.SupportsInt | typing.SupportsIndex, timeout_ns: typing.SupportsInt | typing.SupportsIndex, record: typing.SupportsInt | typing.SupportsIndex, failed: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def record(self) -> int: ...
    @property
    def timeout_ns(self) -> int: ...

class Header:
    def __init__(self, signature: typing.SupportsInt | typing.SupportsIndex, capacity: typing.SupportsInt | typing.SupportsIndex, num_tokens: typing.SupportsInt | typing.SupportsIndex, landing: typing.SupportsInt | typing.SupportsIndex, alignment: typing.SupportsInt | typing.SupportsIndex, refusal: typing.SupportsInt | typing.SupportsIndex) -> None: ...

class LandingOffsets:
    def __init__(self, *args, **kwargs) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def scales(self) -> int: ...
    @property
    def topk_idx(self) -> int: ...
    @property
    def topk_weights(self) -> int: ...

class LowLatencyCombineParams:
    apply_weights: int
    bias: int
    bias_stride: int
    carried: int
    is_token_layout: int
    out: int
    out_topk_weights: int
    source_weights: int
    topk_idx: int
    y: int
    y_stride: int
    def __init__(self) -> None: ...
    def copy(self) -> LowLatencyCombineParams: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    def set_inputs(self, y: torch.Tensor | None) -> None: ...
    def set_outputs(self, out: torch.Tensor | None, words: torch.Tensor | None, offsets: WordOffsets) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def base(self) -> LowLatencyParams: ...
    @property
    def num_bytes(self) -> int: ...

class LowLatencyDispatchParams:
    counts: int
    expert_token_stats: int
    handle_topk_idx: int
    handle_topk_weights: int
    is_token_layout: int
    num_experts: int
    num_recv: int
    out_scales: int
    out_topk_idx: int
    out_topk_weights: int
    out_x: int
    scale_block_stride: int
    scale_row_stride: int
    scale_stride: int
    scale_word_stride: int
    scales: int
    stats_is_int64: int
    topk_idx: int
    topk_idx_is_int64: int
    topk_weights: int
    x: int
    x_stride: int
    def __init__(self) -> None: ...
    def copy(self) -> LowLatencyDispatchParams: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    def set_inputs(self, x: torch.Tensor | None, scales: torch.Tensor | None, topk_idx: torch.Tensor | None, topk_weights: torch.Tensor | None) -> None: ...
    def set_outputs(self, x: torch.Tensor | None, scales: torch.Tensor | None, topk_idx: torch.Tensor | None, words: torch.Tensor | None, offsets: WordOffsets) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def base(self) -> LowLatencyParams: ...
    @property
    def num_bytes(self) -> int: ...

class LowLatencyLayout:
    def __init__(self, *args, **kwargs) -> None: ...
    def credit_offset(self, slot: typing.SupportsInt | typing.SupportsIndex, peer: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def head_bytes(self) -> int: ...
    def header_offset(self, slot: typing.SupportsInt | typing.SupportsIndex, peer: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    @staticmethod
    def make(shape: LowLatencyShape, rail_idx: typing.SupportsInt | typing.SupportsIndex = ...) -> LowLatencyLayout: ...
    def mirror_offset(self, slot: typing.SupportsInt | typing.SupportsIndex, index: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def region_bytes(self) -> int: ...
    def row_offset(self, slot: typing.SupportsInt | typing.SupportsIndex, peer: typing.SupportsInt | typing.SupportsIndex, token: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def with_fp8_rows(self) -> LowLatencyLayout: ...
    @property
    def header_packets(self) -> int: ...
    @property
    def row_stride(self) -> int: ...
    @property
    def slot_stride(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...

class LowLatencyMarkParams:
    value: int
    word: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class LowLatencyMaskParams:
    peer: int
    rank_mask: int
    value: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class LowLatencyParams:
    credit_bases: int
    decisions: int
    late_ranks: int
    local: int
    map: LowLatencyLayout
    mask_late: int
    node_idx: int
    num_tokens: int
    num_topk: int
    rail_idx: int
    rank_mask: int
    record: int
    record_map: LowLatencyRecordLayout
    signature: int
    state: int
    status: int
    turn: int
    unread: int
    wait_us: int
    def __init__(self, *args, **kwargs) -> None: ...
    def set_timeouts(self, timeouts_ns) -> None: ...
    @property
    def comm(self) -> CommParams: ...

class LowLatencyPlans:
    def __init__(self, most: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def find(self, inputs: tuple, others: tuple, options: tuple) -> typing.Any: ...
    @overload
    def keep(self, plan: object, params: LowLatencyDispatchParams, inputs: tuple, others: tuple, options: tuple) -> None: ...
    @overload
    def keep(self, plan: object, params: LowLatencyCombineParams, inputs: tuple, others: tuple, options: tuple) -> None: ...
    def __len__(self) -> int: ...

class LowLatencyRecordLayout:
    def __init__(self, *args, **kwargs) -> None: ...
    @staticmethod
    def make(num_ranks: typing.SupportsInt | typing.SupportsIndex, max_tokens: typing.SupportsInt | typing.SupportsIndex, num_topk: typing.SupportsInt | typing.SupportsIndex, num_nodes: typing.SupportsInt | typing.SupportsIndex) -> LowLatencyRecordLayout: ...
    @property
    def entries(self) -> int: ...
    @property
    def num_words(self) -> int: ...
    @property
    def turn(self) -> int: ...

class LowLatencyRefuseParams:
    is_combine: int
    step: int
    def __init__(self) -> None: ...
    def copy(self) -> LowLatencyRefuseParams: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    def set_message(self, text: str) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def base(self) -> LowLatencyParams: ...
    @property
    def num_bytes(self) -> int: ...

class LowLatencyShape:
    hidden: int
    is_carried: int
    max_tokens: int
    num_experts: int
    num_ranks: int
    num_slots: int
    num_topk: int
    ranks_per_node: int
    def __init__(self) -> None: ...
    @property
    def token_words(self) -> int: ...

class MeetParams:
    counters: int
    epoch: int
    has_trouble: int
    header: Header
    host_waits: int
    is_carried: int
    layout: ExchangeLayout
    max_tokens: int
    reports: int
    taken: int
    there: RowAreas
    trouble: int
    verdict: int
    verdict_before: int
    def __init__(self) -> None: ...
    def name_ranks(self, first: typing.SupportsInt | typing.SupportsIndex, step: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def comm(self) -> CommParams: ...

class RailParams:
    begin_row: int
    end_row: int
    epoch: int
    has_counts: int
    inbox: int
    landed: int
    number: int
    outbox: int
    plan: int
    progress: int
    report: int
    state: int
    step: int
    verdict: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    def on_rail(self, rail: MeetParams) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class RailReport:
    def __init__(self, num_ranks: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def ids_are_64(self) -> int: ...
    @property
    def is_good(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def rows_from(self) -> int: ...
    @property
    def rows_to(self) -> int: ...

class RailSide:
    landed: int
    lost: int
    overflow: int
    part_rows: int
    def __init__(self, *args, **kwargs) -> None: ...
    def on_rail(self, rail: MeetParams) -> None: ...

class RailTarget:
    plan: int
    def __init__(self, *args, **kwargs) -> None: ...
    def on_rail(self, rail: MeetParams) -> None: ...

class RailWords:
    def __init__(self, num_counters: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def num_bytes(self) -> int: ...

class RoutingTable:
    pair_slot: int
    plan: int
    token_slot: int
    topk_idx: int
    topk_weights: int
    def __init__(self) -> None: ...

class RowAreas:
    def __init__(self, *args, **kwargs) -> None: ...
    def generation(self, index: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    @property
    def combine_rows(self) -> int: ...
    @property
    def combine_weights(self) -> int: ...
    @property
    def landing(self) -> LandingOffsets: ...

class RowSource:
    row_stride: int
    rows: int
    scale_stride: int
    scales: int
    def __init__(self, *args, **kwargs) -> None: ...

class ScaleParams:
    block_rows: int
    column_words: int
    columns: int
    num_blocks: int
    rows: int
    scale_words: int
    used_rows: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class SendParams:
    counts: int
    meet: MeetParams
    num_origins: int
    num_tokens: int
    num_topk: int
    opens: int
    round: int
    scale_words: int
    scales_are_ue8m0: int
    table: RoutingTable
    topk_weights: int
    zero_padding: int
    def __init__(self) -> None: ...
    def launch(self, function: deepcomm._C.cuda.Function, grid: int, stream: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def rail(self) -> RailSide: ...
    @property
    def source(self) -> RowSource: ...
    @property
    def target(self) -> ExpertTarget: ...

class WordOffsets:
    def __init__(self, counts: typing.SupportsInt | typing.SupportsIndex, topk_idx: typing.SupportsInt | typing.SupportsIndex, topk_weights: typing.SupportsInt | typing.SupportsIndex, out_topk_weights: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def counts(self) -> int: ...
    @property
    def out_topk_weights(self) -> int: ...
    @property
    def topk_idx(self) -> int: ...
    @property
    def topk_weights(self) -> int: ...

def allocator(here: collections.abc.Callable, arguments: tuple, current_device: object, index: typing.SupportsInt | typing.SupportsIndex, anywhere: collections.abc.Callable) -> collections.abc.Callable: ...
def allocator_of_all(functions: collections.abc.Sequence[object]) -> collections.abc.Callable: ...
def can_describe_tensors() -> bool: ...
def gin_control_bytes(num_ranks: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def low_latency_row_parts(hidden: typing.SupportsInt | typing.SupportsIndex) -> int: ...
def plan_words(num_ranks: typing.SupportsInt | typing.SupportsIndex, num_origins: typing.SupportsInt | typing.SupportsIndex) -> int: ...
