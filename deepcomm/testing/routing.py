# SPDX-License-Identifier: Apache-2.0
"""Routings to test and measure with: which experts each rank's tokens choose, and recorded traces.

Every generator is a pure function of (seed, rank, number of tokens): any rank can compute what any
other rank chose, which is how receivers check what they got without gathering it.

A trace is an ``.npz`` file of the routing of real steps, written by ``save_trace``:

    version      int64 scalar, 1
    num_experts  int64 scalar, E
    num_tokens   int64 [steps, R], tokens of each rank in each step
    topk_idx     int32 [sum of num_tokens, K], -1 = none; ordered by (step, rank, token)
    topk_weights float32, the same shape; optional
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from deepcomm.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "ROUTING_SPECS",
    "RoutedTokens",
    "RoutingShape",
    "RoutingSource",
    "RoutingTrace",
    "load_trace",
    "make_routing",
    "save_trace",
]

ROUTING_SPECS = "uniform, zipf:S, deepseek-v3, hot, trace:FILE"
"""What ``make_routing`` accepts, for messages."""

TRACE_VERSION = 1
V3_NUM_GROUPS = 8
V3_TOP_GROUPS = 4
V3_KEYS_PER_GROUP = 2
V3_GATE_DIM = 64
V3_BIAS_STD = 0.01


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """Sizes a routing is made for.

    Attributes:
        num_ranks: R.
        num_experts: E.
        num_topk: K.
    """

    num_ranks: int
    num_experts: int
    num_topk: int


@dataclass(frozen=True, slots=True, eq=False)
class RoutedTokens:
    """The choice of one rank's tokens.

    Attributes:
        topk_idx: int64 [T, K], distinct in a row, -1 = none.
        topk_weights: float32 [T, K], 0 where ``topk_idx`` is -1; each row sums to 1 unless a trace
            says otherwise.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


class RoutingSource(Protocol):
    """A routing of all ranks, computable on any of them."""

    def __call__(self, rank: int, num_tokens: int) -> RoutedTokens:
        """Return what the first ``num_tokens`` tokens of ``rank`` choose."""


def make_routing(spec: str, shape: RoutingShape, seed: int = 0) -> RoutingSource:
    """Return the routing that ``spec`` names.

    Args:
        spec: "uniform": experts at random. "zipf:S": expert popularity falls as 1 / place^S, the
            places drawn once per seed. "deepseek-v3": that model's gate (sigmoid scores, best 4
            of 8 groups of experts) on random tokens. "hot": every token to experts 0..K-1.
            "trace:FILE": the tokens of a recorded trace, repeated if there are too few.
        shape: R, E and K.
        seed: Seed of everything random.

    Raises:
        InvalidArgument: ``spec`` is unknown or does not suit ``shape``; a trace cannot be read.
    """
    if not 1 <= shape.num_topk <= shape.num_experts:
        raise InvalidArgument(
            f"num_topk: expected 1..num_experts = {shape.num_experts}, got {shape.num_topk}"
        )
    kind, _, argument = spec.partition(":")
    makers: dict[str, Callable[[], RoutingSource]] = {
        "uniform": lambda: _Popularity(shape, seed, exponent=0.0),
        "zipf": lambda: _Popularity(shape, seed, exponent=_zipf_exponent(argument)),
        "deepseek-v3": lambda: _DeepSeekV3(shape, seed),
        "hot": lambda: _Hot(shape),
        "trace": lambda: _Replay(shape, load_trace(argument)),
    }
    takes_argument = kind in ("zipf", "trace")
    if kind not in makers or takes_argument != bool(argument):
        raise InvalidArgument(f"routing: expected one of {ROUTING_SPECS}, got {spec!r}")
    return makers[kind]()


def _zipf_exponent(text: str) -> float:
    try:
        exponent = float(text)
    except ValueError:
        exponent = -1.0
    if not 0.0 <= exponent <= 100.0:
        raise InvalidArgument(f"routing: expected zipf:S with S in 0..100, got S = {text!r}")
    return exponent


def _generator(seed: int, *stream: int) -> torch.Generator:
    # SeedSequence mixes the words well: neighbouring seeds and ranks get unrelated streams.
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


# First word of a stream: what is drawn once for all ranks, and what each rank draws.
_SHARED, _PER_RANK = 0, 1


class _Popularity:
    """Top-k without replacement from fixed expert probabilities, by the Gumbel trick."""

    def __init__(self, shape: RoutingShape, seed: int, *, exponent: float) -> None:
        place = torch.randperm(shape.num_experts, generator=_generator(seed, _SHARED)) + 1
        self._log_popularity = -exponent * place.double().log()
        self._shape = shape
        self._seed = seed

    def __call__(self, rank: int, num_tokens: int) -> RoutedTokens:
        noise = torch.rand(
            (num_tokens, self._shape.num_experts),
            generator=_generator(self._seed, _PER_RANK, rank),
            dtype=torch.float64,
        )
        gumbel = -torch.log(-torch.log(noise.clamp(min=1e-300)))
        key, topk_idx = (gumbel + self._log_popularity).topk(self._shape.num_topk, dim=1)
        return RoutedTokens(topk_idx, torch.softmax(key, dim=1).float())


class _DeepSeekV3:
    """Gate with sigmoid scores and a limited number of expert groups a token."""

    def __init__(self, shape: RoutingShape, seed: int) -> None:
        smallest = V3_NUM_GROUPS * V3_KEYS_PER_GROUP
        if shape.num_experts % V3_NUM_GROUPS or shape.num_experts < smallest:
            raise InvalidArgument(
                f"num_experts: expected a multiple of {V3_NUM_GROUPS}, at least {smallest}, "
                f"for routing deepseek-v3, got {shape.num_experts}"
            )
        most = shape.num_experts // V3_NUM_GROUPS * V3_TOP_GROUPS
        if shape.num_topk > most:
            raise InvalidArgument(
                f"num_topk: expected at most {most} experts in {V3_TOP_GROUPS} groups for routing "
                f"deepseek-v3, got {shape.num_topk}"
            )
        shared = _generator(seed, _SHARED)
        self._gate = torch.randn((V3_GATE_DIM, shape.num_experts), generator=shared)
        self._bias = torch.randn(shape.num_experts, generator=shared) * V3_BIAS_STD
        self._group_size = shape.num_experts // V3_NUM_GROUPS
        self._shape = shape
        self._seed = seed

    def __call__(self, rank: int, num_tokens: int) -> RoutedTokens:
        tokens = torch.randn(
            (num_tokens, V3_GATE_DIM), generator=_generator(self._seed, _PER_RANK, rank)
        )
        score = torch.sigmoid(tokens @ self._gate / V3_GATE_DIM**0.5)
        key = (score + self._bias).view(num_tokens, V3_NUM_GROUPS, self._group_size)
        group_score = key.topk(V3_KEYS_PER_GROUP, dim=2).values.sum(dim=2)
        best = group_score.topk(V3_TOP_GROUPS, dim=1).indices
        allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, value=True)
        key = key.masked_fill(~allowed[:, :, None], float("-inf")).flatten(1)
        topk_idx = key.topk(self._shape.num_topk, dim=1).indices
        weights = score.gather(1, topk_idx)
        return RoutedTokens(topk_idx, weights / weights.sum(dim=1, keepdim=True))


class _Hot:
    """Every token to the same experts: the largest load one rank can get."""

    def __init__(self, shape: RoutingShape) -> None:
        self._num_topk = shape.num_topk

    def __call__(self, rank: int, num_tokens: int) -> RoutedTokens:
        del rank
        topk_idx = torch.arange(self._num_topk).repeat(num_tokens, 1)
        return RoutedTokens(topk_idx, torch.full(topk_idx.shape, 1.0 / self._num_topk))


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Routing recorded over some steps; the module's docstring gives the file format.

    Attributes:
        num_experts: E.
        num_tokens: int64 [steps, R].
        topk_idx: int32 [sum of num_tokens, K], ordered by (step, rank, token).
        topk_weights: float32 of the same shape, or None.
    """

    num_experts: int
    num_tokens: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check that the fields fit together.

        Raises:
            InvalidArgument: They do not.
        """
        if self.num_tokens.ndim != 2 or self.topk_idx.ndim != 2:
            raise InvalidArgument(
                f"trace: expected num_tokens [steps, R] and topk_idx [tokens, K], got "
                f"{list(self.num_tokens.shape)} and {list(self.topk_idx.shape)}"
            )
        total = int(self.num_tokens.sum())
        if total != len(self.topk_idx) or (self.num_tokens < 0).any():
            raise InvalidArgument(
                f"trace: expected one row of topk_idx for each of {total} tokens, "
                f"got {len(self.topk_idx)}"
            )
        if self.topk_idx.size and not -1 <= self.topk_idx.min() <= self.topk_idx.max() < (
            self.num_experts
        ):
            raise InvalidArgument(
                f"trace: expected expert ids in -1..{self.num_experts - 1}, got "
                f"{self.topk_idx.min()}..{self.topk_idx.max()}"
            )
        if self.topk_weights is not None and self.topk_weights.shape != self.topk_idx.shape:
            raise InvalidArgument(
                f"trace: expected topk_weights of shape {list(self.topk_idx.shape)}, "
                f"got {list(self.topk_weights.shape)}"
            )

    @property
    def num_steps(self) -> int:
        """Recorded steps."""
        return int(self.num_tokens.shape[0])

    @property
    def num_ranks(self) -> int:
        """R of the run that was recorded."""
        return int(self.num_tokens.shape[1])

    @property
    def num_topk(self) -> int:
        """K."""
        return int(self.topk_idx.shape[1])

    @classmethod
    def from_steps(
        cls,
        steps: Sequence[Sequence[torch.Tensor]],
        *,
        num_experts: int,
        weights: Sequence[Sequence[torch.Tensor]] | None = None,
    ) -> RoutingTrace:
        """Build a trace from ``steps[step][rank]``, each an integer [T, K].

        Args:
            steps: Expert ids of every rank in every step.
            num_experts: E.
            weights: float32 [T, K] likewise; optional.
        """
        counts = np.array([[len(ids) for ids in step] for step in steps], dtype=np.int64)
        topk_idx = torch.cat([ids.cpu().int() for step in steps for ids in step]).numpy()
        topk_weights = None
        if weights is not None:
            topk_weights = torch.cat([w.cpu().float() for step in weights for w in step]).numpy()
        return cls(num_experts, counts, topk_idx, topk_weights)

    def rows_of(self, rank: int, num_ranks: int) -> np.ndarray:
        """Return the rows of ``topk_idx`` that ``rank`` of ``num_ranks`` replays, in order.

        With the recorded number of ranks, each replays its own tokens, step after step; otherwise
        all tokens are dealt out in equal consecutive shares.
        """
        total = len(self.topk_idx)
        if num_ranks != self.num_ranks:
            return np.arange(rank * total // num_ranks, (rank + 1) * total // num_ranks)
        end = self.num_tokens.reshape(-1).cumsum().reshape(self.num_tokens.shape)[:, rank]
        start = end - self.num_tokens[:, rank]
        return np.concatenate([np.arange(a, b) for a, b in zip(start, end, strict=True)])


def save_trace(path: str | Path, trace: RoutingTrace) -> None:
    """Write ``trace`` to ``path``, an ``.npz`` file by that very name."""
    arrays = {
        "version": np.int64(TRACE_VERSION),
        "num_experts": np.int64(trace.num_experts),
        "num_tokens": trace.num_tokens.astype(np.int64),
        "topk_idx": trace.topk_idx.astype(np.int32),
    }
    if trace.topk_weights is not None:
        arrays["topk_weights"] = trace.topk_weights.astype(np.float32)
    with Path(path).open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_trace(path: str | Path) -> RoutingTrace:
    """Read a trace that ``save_trace`` wrote.

    Raises:
        InvalidArgument: The file is missing, is no trace or does not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        version = int(arrays["version"])
        fields = (int(arrays["num_experts"]), arrays["num_tokens"], arrays["topk_idx"])
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InvalidArgument(f"trace {path}: cannot be read: {error!r}") from error
    if version != TRACE_VERSION:
        raise InvalidArgument(f"trace {path}: expected version {TRACE_VERSION}, got {version}")
    return RoutingTrace(*fields, arrays.get("topk_weights"))


class _Replay:
    """Tokens of a trace, from the start again when it ends."""

    def __init__(self, shape: RoutingShape, trace: RoutingTrace) -> None:
        got = (trace.num_experts, trace.num_topk)
        if got != (shape.num_experts, shape.num_topk):
            raise InvalidArgument(
                f"routing: expected a trace of {shape.num_experts} experts, top-{shape.num_topk}, "
                f"got {got[0]} experts, top-{got[1]}"
            )
        self._num_ranks = shape.num_ranks
        self._trace = trace

    def __call__(self, rank: int, num_tokens: int) -> RoutedTokens:
        rows = self._trace.rows_of(rank, self._num_ranks)
        if len(rows) == 0 and num_tokens:
            raise InvalidArgument(f"trace: expected tokens for rank {rank}, got none")
        rows = np.resize(rows, num_tokens)
        topk_idx = torch.from_numpy(self._trace.topk_idx[rows].astype(np.int64))
        if self._trace.topk_weights is not None:
            weights = torch.from_numpy(self._trace.topk_weights[rows].astype(np.float32))
        else:
            weights = torch.ones(topk_idx.shape)
            weights /= (topk_idx >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        return RoutedTokens(topk_idx, weights.masked_fill(topk_idx < 0, 0.0))
