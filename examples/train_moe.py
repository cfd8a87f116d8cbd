# SPDX-License-Identifier: Apache-2.0
"""Train a small MoE language model on the help texts that every Python has, experts over the ranks.

    python examples/train_moe.py --plot loss.png
    torchrun --nproc-per-node 4 examples/train_moe.py --plot loss.png --record-routing routing.npz

Each step's batch is the same whatever the number of ranks: every rank takes a consecutive share of
its sequences. Gradients of replicated parameters are summed over the ranks; those of an expert are
complete where it lives, since its rows come from all ranks. So with one seed and FP32 the losses
of 1, 2 and 4 ranks differ only by the order of some FP32 sums: by less than ``LOSS_TOLERANCE``,
relative, over the first ``LOSS_TOLERANCE_STEPS`` steps. Later they part slowly, as any two
roundings of one training do: a router's near tie that falls the other way sends a token elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from deepcomm import Buffer, RecvLayout
from deepcomm.nn import ExpertParallelMoE, GateConfig, MoEConfig
from deepcomm.testing.routing import RoutingTrace, save_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LOSS_TOLERANCE = 1e-4
LOSS_TOLERANCE_STEPS = 30
VOCABULARY = 256
NUM_HEADS = 4
WARMUP_STEPS = 20
FINAL_LR_RATIO = 0.1
EMBEDDING_STD = 0.5  # comparable to what the blocks add
HEAD_STD = 0.02
BIAS_RATE = 1e-3


@dataclass(frozen=True)
class Settings:
    """Command line; ``parse`` holds the defaults and the meanings."""

    steps: int
    seed: int
    batch: int
    sequence: int
    layers: int
    hidden: int
    experts: int
    topk: int
    groups: int
    chosen_groups: int
    lr: float
    layout: str
    device: str
    dtype: str
    ranks_per_node: int | None
    threads: int
    print_every: int
    plot: Path | None
    json: Path | None
    record_routing: Path | None

    @property
    def wire_dtype(self) -> torch.dtype:
        """Dtype of the rows that are exchanged."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small MoE language model.")
    add = parser.add_argument
    add("--steps", type=int, default=300)
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=16, help="sequences a step, over all ranks")
    add("--sequence", type=int, default=128, help="bytes a sequence")
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=128)
    add("--experts", type=int, default=16)
    add("--topk", type=int, default=4)
    add("--groups", type=int, default=4, help="groups of experts")
    add("--chosen-groups", type=int, default=2, help="groups a token may use")
    add("--lr", type=float, default=3e-3)
    add("--layout", choices=("expert", "expert_padded"), default="expert")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on cpu, else bfloat16")
    add("--ranks-per-node", type=int, help="play several nodes on one host")
    add("--threads", type=int, default=1, help="a rank; more pay off with larger layers only")
    add("--print-every", type=int, default=10, help="steps between printed losses")
    add("--plot", type=Path, help="write the loss curve to this PNG (needs matplotlib)")
    add("--json", type=Path, help="write losses and settings to this file")
    add("--record-routing", type=Path, help="write the routing of every dispatch to this .npz")
    options = vars(parser.parse_args(arguments))
    options["dtype"] = options["dtype"] or ("float32" if options["device"] == "cpu" else "bfloat16")
    return Settings(**options)


class Corpus:
    """The texts as one sequence of bytes, and the batches cut from it."""

    def __init__(self, settings: Settings) -> None:
        """Join the texts in the order of their names."""
        text = "\n\n".join(topics[name] for name in sorted(topics))
        self.tokens = torch.tensor(list(text.encode()), dtype=torch.int64)
        self.settings = settings

    def share(self, step: int, rank: int, num_ranks: int) -> torch.Tensor:
        """Return the sequences [n, sequence + 1] that ``rank`` takes of the batch of ``step``."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        last = len(self.tokens) - settings.sequence - 1
        starts = torch.randint(last, (settings.batch, 1), generator=generator)
        mine = starts.tensor_split(num_ranks)[rank]
        return self.tokens[mine + torch.arange(settings.sequence + 1)]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, hidden: int) -> None:
        """Create the projections."""
        super().__init__()
        self.inputs = nn.Linear(hidden, 3 * hidden, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, S, H] from [B, S, H]."""
        shape = (*x.shape[:2], 3, NUM_HEADS, x.shape[2] // NUM_HEADS)
        q, k, v = self.inputs(x).view(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """Attention and experts, each behind a norm and beside a residual path."""

    def __init__(self, buffer: Buffer, settings: Settings, layer: int) -> None:
        """Create the layer; ``layer`` keeps its experts' seeds apart from other layers'."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(settings.hidden) for _ in range(2))
        self.attention = Attention(settings.hidden)
        gate = GateConfig(settings.experts, settings.topk, settings.groups, settings.chosen_groups)
        config = MoEConfig(
            gate=gate,
            hidden=settings.hidden,
            intermediate=settings.hidden,
            shared_intermediate=settings.hidden,
            recv_layout=RecvLayout(settings.layout),
            seed=settings.seed * settings.layers + layer,
        )
        self.moe = ExpertParallelMoE(buffer, config)
        self.wire_dtype = settings.wire_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, S, H] from [B, S, H]."""
        x = x + self.attention(self.norms[0](x))
        return x + self.moe(self.norms[1](x).to(self.wire_dtype))


class LanguageModel(nn.Module):
    """A transformer over bytes."""

    def __init__(self, buffer: Buffer, settings: Settings) -> None:
        """Create the same replicated weights on every rank, and this rank's experts."""
        super().__init__()
        torch.manual_seed(settings.seed)
        self.token = nn.Embedding(VOCABULARY, settings.hidden)
        self.position = nn.Embedding(settings.sequence, settings.hidden)
        self.blocks = nn.ModuleList(
            Block(buffer, settings, layer) for layer in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.hidden)
        self.head = nn.Linear(settings.hidden, VOCABULARY, bias=False)
        for weight in (self.token.weight, self.position.weight):
            nn.init.normal_(weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=HEAD_STD)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [B, S, 256] from int64 [B, S]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @property
    def moes(self) -> list[ExpertParallelMoE]:
        """The MoE layers, first to last."""
        return [block.moe for block in self.blocks]

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that every rank holds a copy of."""
        local = {id(parameter) for moe in self.moes for parameter in moe.expert_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in local]


def lr_ratio(num_steps: int, step: int) -> float:
    """Warm up linearly, then follow half a cosine."""
    done = min(step / num_steps, 1.0)
    cosine = FINAL_LR_RATIO + (1 - FINAL_LR_RATIO) * (1 + math.cos(math.pi * done)) / 2
    return min((step + 1) / WARMUP_STEPS, 1.0) * cosine


class Trainer:
    """One rank's model, optimiser and record of what its tokens chose."""

    def __init__(self, buffer: Buffer, settings: Settings) -> None:
        """Create everything on the buffer's device."""
        self.buffer = buffer
        self.settings = settings
        self.corpus = Corpus(settings)
        self.model = LanguageModel(buffer, settings).to(buffer.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(lr_ratio, settings.steps)
        )
        self.routing: list[torch.Tensor] = []

    def step(self, step: int) -> float:
        """Train on one batch; return its mean loss over all ranks."""
        settings = self.settings
        share = self.corpus.share(step, self.buffer.rank, self.buffer.num_ranks)
        share = share.to(self.buffer.device)
        autocast = settings.wire_dtype is torch.bfloat16
        with torch.autocast(share.device.type, torch.bfloat16, enabled=autocast):
            logits = self.model(share[:, :-1])
        if settings.record_routing:
            self.routing += [moe.last_routing.topk_idx.cpu() for moe in self.model.moes]
        total = functional.cross_entropy(
            logits.float().flatten(0, 1), share[:, 1:].flatten(), reduction="sum"
        )
        loss = total / (settings.batch * settings.sequence)
        self.optimizer.zero_grad()
        loss.backward()
        loss, *loads = self._sum_over_ranks(loss)
        self.optimizer.step()
        self.scheduler.step()
        for moe, load in zip(self.model.moes, loads, strict=True):
            moe.gate.update_bias(load, BIAS_RATE)
        return loss.item()

    def _sum_over_ranks(self, loss: torch.Tensor) -> Sequence[torch.Tensor]:
        """Sum the replicated gradients in place; return the sums of the loss and of each load."""
        tensors = [parameter.grad for parameter in self.model.replicated_parameters()]
        num_grads = len(tensors)
        tensors += [loss.detach(), *(moe.gate.load for moe in self.model.moes)]
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        dist.all_reduce(flat, group=self.buffer.group)
        sums = flat.split([tensor.numel() for tensor in tensors])
        for grad, total in zip(tensors[:num_grads], sums, strict=False):
            grad.copy_(total.view_as(grad))
        return sums[num_grads:]

    def save_routing(self, path: Path) -> None:
        """Gather every dispatch's choices, in the order of the dispatches, and write them."""
        group, rank = self.buffer.group, self.buffer.rank
        gathered: list[list[torch.Tensor]] = [[]] * self.buffer.num_ranks
        dist.gather_object(self.routing, gathered if rank == 0 else None, dst=0, group=group)
        if rank == 0:
            dispatches = list(zip(*gathered, strict=True))
            trace = RoutingTrace.from_steps(dispatches, num_experts=self.settings.experts)
            save_trace(path, trace)


@contextmanager
def progress_bar(total: int) -> Iterator[tuple[Callable[[str], object], Callable[[str], object]]]:
    """Yield (advance one step, showing a line; print a line); no bar where rich is missing."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        yield (lambda _line: None), print
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), Remaining())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield (lambda line: bar.update(task, advance=1, description=line)), bar.console.print


def report(losses: Iterator[float], settings: Settings) -> list[float]:
    """Show the losses as they come; return them all."""
    history: list[float] = []
    start = time.perf_counter()
    with progress_bar(settings.steps) as (advance, say):
        for step, loss in enumerate(losses):
            history.append(loss)
            rate = (step + 1) * settings.batch * settings.sequence / (time.perf_counter() - start)
            line = f"loss {loss:.4f}  {rate:,.0f} tokens/s"
            advance(line)
            if step % settings.print_every == 0 or step == settings.steps - 1:
                say(f"step {step:5d}  {line}")
    return history


def save_results(losses: list[float], num_ranks: int, settings: Settings) -> None:
    """Write the loss curve and the losses where the command line says so."""
    if settings.plot:
        plot(losses, num_ranks, settings.plot)
    if settings.json:
        fields = {name: value for name, value in asdict(settings).items() if name != "json"}
        record = {"num_ranks": num_ranks, "losses": losses, "settings": fields}
        settings.json.write_text(json.dumps(record, indent=1, default=str) + "\n")


def plot(losses: list[float], num_ranks: int, path: Path) -> None:
    """Draw the loss of each step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(range(len(losses)), losses)
    axes.set(xlabel="step", ylabel="loss, nats a byte", title=f"MoE training, ranks: {num_ranks}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def join_group(settings: Settings) -> None:
    """Join the ranks that torchrun started, or be the only one."""
    torch.set_num_threads(settings.threads)
    backend = "gloo"
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def train(settings: Settings) -> None:
    """Train on this rank of the default group."""
    num_ranks = dist.get_world_size()
    buffer = Buffer(
        dist.group.WORLD,
        num_experts=settings.experts,
        num_topk=settings.topk,
        hidden=settings.hidden,
        max_tokens_per_rank=-(-settings.batch // num_ranks) * settings.sequence,
        device=settings.device,
        ranks_per_node=settings.ranks_per_node,
        num_generations=settings.layers + 2,  # each layer keeps its rows until backward
    )
    with buffer:
        trainer = Trainer(buffer, settings)
        losses = map(trainer.step, range(settings.steps))
        if buffer.rank == 0:
            save_results(report(losses, settings), num_ranks, settings)
        else:
            list(losses)
        if settings.record_routing:
            trainer.save_routing(settings.record_routing)


def main() -> None:
    """Run the command line."""
    settings = parse()
    join_group(settings)
    try:
        train(settings)
    finally:
        # Gloo's threads abort the process if they outlive the interpreter, and they live as long as
        # the group is referenced: end the reference cycles that still hold the trainer.
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
