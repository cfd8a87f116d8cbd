# SPDX-License-Identifier: Apache-2.0
"""Row operations of the CPU backend: every instruction set here against torch, bitwise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from deepcomm._C import simd

ISAS = simd.supported_isas()
TILE = 128
E4M3_MAX = 448.0
GUARD = 0xEE
GUARD_BYTES = 64
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
DTYPES = list(DTYPE_CODES)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

each_isa = pytest.mark.parametrize("isa", ISAS, ids=simd.isa_name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rows_of(tensor: torch.Tensor) -> simd.Rows:
    stride = tensor.stride(0) * tensor.element_size() if tensor.dim() > 1 else 0
    return simd.Rows(tensor.data_ptr(), stride)


def guarded(num_bytes: int, misalign: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer of guard bytes and num_bytes inside it, misalign bytes past a line."""
    whole = torch.full((num_bytes + 4 * GUARD_BYTES,), GUARD, dtype=torch.uint8)
    start = GUARD_BYTES + -whole.data_ptr() % 64 + misalign
    return whole, whole[start : start + num_bytes]


def assert_guards(whole: torch.Tensor, middle: torch.Tensor) -> None:
    start = middle.data_ptr() - whole.data_ptr()
    assert bool((whole[:start] == GUARD).all()), "wrote before the row"
    assert bool((whole[start + middle.numel() :] == GUARD).all()), "wrote behind the row"


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare bitwise; a NaN equals any NaN."""
    got, want = got.contiguous(), want.contiguous()
    both_nan = got.isnan() & want.isnan()
    same = got.view(BITS[got.dtype]) == want.view(BITS[want.dtype])
    wrong = (~(same | both_nan)).nonzero().flatten()
    assert wrong.numel() == 0, (wrong[:8], got.flatten()[wrong[:8]], want.flatten()[wrong[:8]])


# --- cast ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cast:
    data: torch.Tensor  # uint8 [T, H]
    scales: torch.Tensor  # float32 or uint8 [T, S]


def cast(isa: simd.Isa, x: torch.Tensor, *, ue8m0: bool) -> Cast:
    num_rows, hidden = x.shape
    whole, middle = guarded(num_rows * hidden)
    data = middle.view(num_rows, hidden)
    scales = torch.zeros(
        num_rows, -(-hidden // TILE), dtype=torch.uint8 if ue8m0 else torch.float32
    )
    simd.cast_rows(
        isa,
        rows_of(data),
        rows_of(scales),
        rows_of(x),
        dtype=DTYPE_CODES[x.dtype],
        num_rows=num_rows,
        num_elements=hidden,
        ue8m0=ue8m0,
    )
    assert_guards(whole, middle)
    return Cast(data.clone(), scales)


def cast_reference(x: torch.Tensor, *, ue8m0: bool) -> Cast:
    num_rows, hidden = x.shape
    tiles = torch.nn.functional.pad(x.float(), (0, -hidden % TILE)).view(num_rows, -1, TILE)
    amax = tiles.abs().amax(-1).clamp(min=1e-4)
    limit = torch.full_like(amax, E4M3_MAX)  # a Python number would be divided by reciprocal
    scales, inv = amax / limit, limit / amax
    if ue8m0:
        bits = scales.view(torch.int32)
        exponent = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp(max=255)
        finite = bits < 0x7F800000
        inv = torch.where(finite, torch.ldexp(torch.ones_like(amax), 127 - exponent), torch.nan)
        scales = exponent.to(torch.uint8)
    data = (tiles * inv.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Cast(data.view(torch.uint8).view(num_rows, -1)[:, :hidden].contiguous(), scales)


def assert_same_cast(got: Cast, want: Cast) -> None:
    if want.scales.dtype == torch.float32:
        assert_same_bits(got.scales, want.scales)
    else:
        assert torch.equal(got.scales, want.scales)
    # The sign of a NaN is not part of the contract.
    nan = ((got.data & 0x7F) == 0x7F) & ((want.data & 0x7F) == 0x7F)
    wrong = ((got.data != want.data) & ~nan).nonzero()
    assert wrong.numel() == 0, (wrong[:8], got.data[wrong[:, 0], wrong[:, 1]][:8])


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Return all 65536 values of a 16-bit dtype, or 2**18 random bit patterns of float32."""
    if dtype == torch.float32:
        return torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32).view(dtype)
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def e4m3_ties() -> torch.Tensor:
    """Return the values of E4M3, their midpoints and the floats next to them, both signs."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
    near = torch.cat([points.nextafter(torch.tensor(e)) for e in (0.0, 1000.0)])
    values = torch.cat([points, near])
    return torch.cat([values, -values])


def unscaled_tiles(values: torch.Tensor) -> torch.Tensor:
    """Return [T, 128] with the values up to 448, each tile led by 448 so that inv is exactly 1."""
    values = values[values.abs() <= E4M3_MAX]
    values = torch.nn.functional.pad(values, (0, -values.numel() % (TILE - 1))).view(-1, TILE - 1)
    lead = torch.full((values.shape[0], 1), E4M3_MAX, dtype=values.dtype)
    return torch.cat([lead, values], dim=1)


@each_isa
@each_dtype
def test_cast_every_value_with_unit_scale(isa: simd.Isa, dtype: torch.dtype) -> None:
    values = all_values(dtype)
    if dtype == torch.float32:
        values = torch.cat([values, e4m3_ties(), torch.randn(2**16), torch.randn(2**16) * 2**-7])
    x = unscaled_tiles(values)
    got = cast(isa, x, ue8m0=False)
    assert torch.equal(got.scales, torch.ones(x.shape[0], 1))
    assert torch.equal(got.data, x.float().to(torch.float8_e4m3fn).view(torch.uint8))


@each_isa
@each_dtype
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_cast_every_value_with_its_scale(isa: simd.Isa, dtype: torch.dtype, ue8m0: bool) -> None:
    torch.manual_seed(0)
    values = all_values(dtype)
    for x in (values, values[torch.randperm(values.numel())]):
        x = x.view(-1, 1024)
        assert_same_cast(cast(isa, x, ue8m0=ue8m0), cast_reference(x, ue8m0=ue8m0))


@each_isa
@each_dtype
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("hidden", [1, 8, 127, 128, 136, 200, 7168])
def test_cast_tails(isa: simd.Isa, dtype: torch.dtype, ue8m0: bool, hidden: int) -> None:
    torch.manual_seed(hidden)
    spread = torch.logspace(-7, 7, 16).unsqueeze(1)  # tiny rows meet the floor of amax
    x = (torch.randn(16, hidden) * spread).to(dtype)
    assert_same_cast(cast(isa, x, ue8m0=ue8m0), cast_reference(x, ue8m0=ue8m0))


@each_isa
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_cast_scales_at_powers_of_two(isa: simd.Isa, ue8m0: bool) -> None:
    """Magnitudes at, just below and just above 448 * 2^k decide a UE8M0 exponent."""
    exact = E4M3_MAX * 2.0 ** torch.arange(-140, 120)
    amax = torch.cat([exact, *(exact.nextafter(torch.tensor(e)) for e in (0.0, torch.inf))])
    x = amax.unsqueeze(1) * torch.linspace(-1, 1, TILE)
    assert_same_cast(cast(isa, x, ue8m0=ue8m0), cast_reference(x, ue8m0=ue8m0))


def special_tiles(dtype: torch.dtype) -> torch.Tensor:
    """Return [16, 128]: random tiles with one or two special values at varying places."""
    torch.manual_seed(1)
    x = torch.randn(16, TILE)
    x[0] = 0.0
    x[1] = -0.0
    x[2] = 1e-7
    specials = (torch.nan, -torch.nan, torch.inf, -torch.inf)
    for row, (first, second) in enumerate(itertools.product(specials, (None, *specials[:2])), 3):
        x[row, (row * 37) % TILE] = first
        if second is not None:
            x[row, (row * 53 + 1) % TILE] = second
    x[15] = torch.inf
    return x.to(dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
def test_cast_specials(isa: simd.Isa, dtype: torch.dtype, ue8m0: bool) -> None:
    x = special_tiles(dtype)
    got = cast(isa, x, ue8m0=ue8m0)
    assert_same_cast(got, cast_reference(x, ue8m0=ue8m0))
    nan_rows = ~x.float().isfinite().all(1) if ue8m0 else x.isnan().any(1)
    assert bool(((got.data & 0x7F) == 0x7F)[nan_rows].all())
    portable = cast(simd.Isa.PORTABLE, x, ue8m0=ue8m0)
    assert torch.equal(got.data, portable.data), "NaN signs differ between instruction sets"


@each_isa
def test_cast_strided_rows(isa: simd.Isa) -> None:
    wide = torch.randn(5, 300).to(torch.bfloat16)
    x = wide[:, 3:203]
    assert_same_cast(cast(isa, x, ue8m0=False), cast_reference(x.contiguous(), ue8m0=False))


# --- reduce -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    group_sizes: tuple[int, ...]
    hidden: int
    weighted: bool = False
    bias: bool = False
    stream: bool = False
    dst_misalign: int = 0

    @property
    def id(self) -> str:
        flags = [name for name in ("weighted", "bias", "stream") if getattr(self, name)]
        groups = "x".join(map(str, self.group_sizes)) or "none"
        return "-".join([f"g{groups}", f"h{self.hidden}", f"a{self.dst_misalign}", *flags])


@dataclass(frozen=True)
class Operands:
    rows: torch.Tensor  # [n, H]
    weights: torch.Tensor | None  # float32 [n]
    bias: torch.Tensor | None  # [H]


SUMS = [
    Sum((), 200),
    Sum((), 200, bias=True, stream=True),
    *(Sum((n,), 7168, stream=n % 2 == 0) for n in range(1, 10)),
    *(
        Sum((3,), h, weighted=True, stream=s)
        for h in (1, 7, 8, 33, 136, 200)
        for s in (True, False)
    ),
    *(Sum((4,), 1000, stream=True, bias=True, dst_misalign=a) for a in (16, 32, 48)),
    Sum((2, 3, 1, 4), 7168),
    Sum((2, 3, 1, 4), 1111, weighted=True, bias=True, stream=True),
    Sum((1, 1, 1, 1), 600, bias=True),
    Sum((4, 1, 1), 600, weighted=True),
    Sum((1, 1, 4), 600),
    Sum((0, 3, 0, 2, 0), 600, weighted=True, bias=True),
    Sum((0, 0), 64, bias=True),
    Sum((32,), 264, weighted=True, stream=True),
]


def make_operands(case: Sum, dtype: torch.dtype) -> Operands:
    torch.manual_seed(case.hidden + len(case.group_sizes))
    num_rows = sum(case.group_sizes)
    spread = 2.0 ** torch.randint(-6, 6, (num_rows, 1))  # makes every order of additions differ
    return Operands(
        rows=(torch.randn(num_rows, case.hidden) * spread).to(dtype),
        weights=torch.randn(num_rows) if case.weighted else None,
        bias=torch.randn(case.hidden).to(dtype) if case.bias else None,
    )


def reduce(isa: simd.Isa, case: Sum, operands: Operands) -> torch.Tensor:
    dtype = operands.rows.dtype
    whole, middle = guarded(case.hidden * dtype.itemsize, case.dst_misalign)
    job = simd.Reduction(
        dst=rows_of(middle),
        dtype=DTYPE_CODES[dtype],
        num_elements=case.hidden,
        rows=[row.data_ptr() for row in operands.rows],
        weights=[] if operands.weights is None else operands.weights.tolist(),
        group_sizes=list(case.group_sizes),
        bias=0 if operands.bias is None else operands.bias.data_ptr(),
        stream=case.stream,
    )
    simd.reduce_rows(isa, job, num_outputs=1)
    assert_guards(whole, middle)
    return middle.clone().view(dtype)


def reduce_reference(case: Sum, operands: Operands) -> torch.Tensor:
    total = torch.zeros(case.hidden)
    row = 0
    for size in case.group_sizes:
        partial = torch.zeros(case.hidden)
        for _ in range(size):
            x = operands.rows[row].float()
            partial += x if operands.weights is None else x * operands.weights[row]
            row += 1
        total += partial
    if operands.bias is not None:
        total += operands.bias.float()
    return total.to(operands.rows.dtype)


@each_isa
@each_dtype
@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.id)
def test_reduce_matches_steps(isa: simd.Isa, dtype: torch.dtype, case: Sum) -> None:
    operands = make_operands(case, dtype)
    assert_same_bits(reduce(isa, case, operands), reduce_reference(case, operands))


def test_reduce_cases_distinguish_orders() -> None:
    """The operands above are sharp: regrouping or reversing their sums changes bits."""
    grouped, flat = Sum((2, 3, 1, 4), 7168), Sum((10,), 7168)
    operands = make_operands(grouped, torch.float32)
    backwards = Operands(operands.rows.flip(0), None, None)
    want = reduce_reference(grouped, operands)
    assert not torch.equal(want, reduce_reference(flat, operands))
    assert not torch.equal(reduce_reference(flat, operands), reduce_reference(flat, backwards))


@each_isa
@each_dtype
@pytest.mark.parametrize("weight", [1.0, -1.7e-3, 3.3e4, 1.1e-38, 2.0**-16])
def test_reduce_rounds_every_value(isa: simd.Isa, dtype: torch.dtype, weight: float) -> None:
    """One weighted row: subnormals, ties, overflow to infinity and NaN of the stores."""
    values = all_values(dtype)
    case = Sum((1,), values.numel(), weighted=True)
    operands = Operands(values.unsqueeze(0), torch.tensor([weight]), None)
    assert_same_bits(reduce(isa, case, operands), reduce_reference(case, operands))


@each_isa
@each_dtype
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000], ids=hex)
def test_reduce_keeps_nan_of_any_payload(isa: simd.Isa, dtype: torch.dtype, bits: int) -> None:
    """Rounding a NaN like a number would carry a payload of ones into the sign: a zero."""
    weight = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    case = Sum((1,), 200, weighted=True)
    got = reduce(isa, case, Operands(torch.ones(1, 200, dtype=dtype), weight, None))
    assert bool(got.isnan().all())


@each_isa
@each_dtype
def test_reduce_pairs_of_every_value(isa: simd.Isa, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    values = all_values(dtype)
    for shift in torch.randint(1, values.numel(), (4,)).tolist():
        rows = torch.stack([values, values.roll(shift)])
        case = Sum((2,), values.numel())
        operands = Operands(rows, None, None)
        assert_same_bits(reduce(isa, case, operands), reduce_reference(case, operands))


@each_isa
@pytest.mark.parametrize("group_sizes", [(), (1,), (1, 1), (2, 2)], ids=str)
def test_reduce_never_gives_negative_zero(isa: simd.Isa, group_sizes: tuple[int, ...]) -> None:
    rows = torch.full((sum(group_sizes), 40), -0.0)
    case = Sum(group_sizes, 40, bias=True)
    got = reduce(isa, case, Operands(rows, None, torch.full((40,), -0.0)))
    assert torch.equal(got.view(torch.int32), torch.zeros(40, dtype=torch.int32))


# --- copy ---------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("stream", [False, True], ids=["copy", "copy_stream"])
@pytest.mark.parametrize(
    "num_bytes", [0, 1, 15, 16, 63, 64, 65, 127, 128, 240, 255, 256, 257, 600, 1000, 14336, 14351]
)
def test_copy_moves_exactly_the_row(isa: simd.Isa, stream: bool, num_bytes: int) -> None:
    torch.manual_seed(num_bytes)
    for dst_misalign, src_misalign in itertools.product((0, 1, 16, 32, 48, 63), (0, 1, 17, 32)):
        _, src = guarded(num_bytes, src_misalign)
        src.random_(0, 256)
        whole, dst = guarded(num_bytes, dst_misalign)
        simd.copy_rows(
            isa, rows_of(dst), rows_of(src), num_rows=1, num_bytes=num_bytes, stream=stream
        )
        assert torch.equal(dst, src)
        assert_guards(whole, dst)


# --- choice -------------------------------------------------------------------------------------


def test_best_isa_is_the_widest_supported() -> None:
    assert simd.Isa.PORTABLE in ISAS
    assert simd.best_isa() == ISAS[-1]


def test_isa_names() -> None:
    names = [simd.isa_name(isa) for isa in (simd.Isa.PORTABLE, simd.Isa.AVX2, simd.Isa.AVX512)]
    assert names == ["portable", "avx2", "avx512"]
