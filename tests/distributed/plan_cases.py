"""Models with shards whose memory is predicted, and what their ranks really take."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from distributed.fsdp_cases import mesh_of
from distributed.scenarios import outcome
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.memory.dry_run import DryRun, ProbeBatch
from gradfold.memory.estimate import PeakEstimate
from gradfold.memory.tracker import MemoryTracker
from gradfold.precision import read_option

ROWS, WIDTH, CLASSES = 24, 64, 5
SIZES = (2, 8)  # twelve micro-batches, and three


class Gathering(AllGather):
    """As usual, out of every tracker's sight: threads of gloo keep what they send for longer or shorter."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        with _disable_current_modes():
            whole = torch.empty_like(output_tensor)
            dist.all_gather_single(whole, input_tensor.clone(), group=group)
            output_tensor.copy_(whole)


class Summing(ReduceScatter):
    """As usual, out of sight."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        with _disable_current_modes():
            part = torch.empty_like(output_tensor)
            dist.reduce_scatter_single(part, input_tensor.clone(), op, group=group)
            output_tensor.copy_(part)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Layers in a list, an embedding that is shared with the head, a buffer, a part that is frozen."""

    def __init__(self, is_checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.register_buffer("scale", torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embed.weight
        self.layers[0].requires_grad_(False)
        self.is_checkpointed = is_checkpointed

    def forward(self, x):
        x = self.embed(x) * self.scale
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.is_checkpointed else layer(x)
        return self.head(x)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]).float(), batch["y"])


def shard_layers(model, mesh, **options):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def shard_in_groups(model, mesh):
    """Two modules at once, one of whose norms is nobody's shard; the other layer is gathered ahead."""
    norm = model.layers[1].norm.requires_grad_(False)
    ignored = set(norm.parameters())
    fully_shard([model.layers[1].up, model.layers[1].down], mesh=mesh, reshard_after_forward=False)
    fully_shard(model.layers[0], mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    model.set_modules_to_forward_prefetch([model.layers[0]])


@dataclass
class Case:
    shard: Any
    make: Any = Tower
    options: dict[str, Any] = field(default_factory=dict)


NARROW = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = {
    "layers": Case(shard_layers),
    "layers, reduced once": Case(shard_layers, options={"fsdp_reduce": "per_window"}),
    "checkpoints": Case(shard_layers, make=partial(Tower, is_checkpointed=True)),
    "bfloat16, reduced once": Case(partial(shard_layers, mp_policy=NARROW), options={"fsdp_reduce": "per_window"}),
    "kept whole": Case(partial(shard_layers, reshard_after_forward=False)),
    "groups": Case(shard_in_groups),
    "offloaded": Case(partial(shard_layers, offload_policy=CPUOffloadPolicy(pin_memory=False))),
}


def make_batch():
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randint(0, CLASSES, (ROWS,), generator=generator) for name in ("x", "y")}


def run_cases(rank, size, names):
    return {name: predict_and_track(rank, size, CASES[name], name == names[0]) for name in names}


def predict_and_track(rank, size, case, also_after):
    """The peaks that rank 0 predicts, before and maybe after training, and the real ones; by size and phase."""
    torch.manual_seed(0)
    model = case.make()
    case.shard(model, mesh_of(size))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(Gathering())
            module.set_custom_reduce_scatter(Summing())
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    batch = make_batch()
    predicted, real = [], {}
    if rank == 0:  # the others need not know
        predicted.append(predict(model, optimizer, batch, case))
    for micro_batch_size in SIZES:
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=micro_batch_size, **case.options)
        train(accumulator, optimizer, batch)
        real[micro_batch_size] = track(accumulator, optimizer, batch)
    with torch.no_grad():
        model(batch["x"])  # leaves the outermost parameters whole
    if rank == 0 and also_after:
        shards = [one for group in optimizer.param_groups for one in group["params"]]
        before = [local(one).clone() for one in shards]
        predicted.append(predict(model, optimizer, batch, case))
        torch.testing.assert_close(before, [local(one) for one in shards], rtol=0, atol=0)
    train(accumulator, optimizer, batch)  # as if nothing had been asked
    return predicted, real


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def predict(model, optimizer, batch, case):
    reduces_once = case.options.get("fsdp_reduce") == "per_window"
    dry_run = DryRun(
        model, loss_fn, ProbeBatch(batch, None), optimizer, read_option(None, model), reduces_once=reduces_once
    )
    prediction = PeakEstimate(dry_run, torch.device("cpu"))
    assert prediction.source == "fake tensors", prediction.reason
    return {size: {phase: one.total for phase, one in prediction.peaks(size).items()} for size in SIZES}


def savings(rank, size, names):
    """What a plan for a large batch proposes where 512 rows fit: the choice, and the size with each saving."""
    return {name: savings_of(size, CASES[name]) for name in names} if rank == 0 else None


def savings_of(size, case):
    model = Tower()
    case.shard(model, mesh_of(size))
    accumulator = gradfold.Accumulator(model, loss_fn, **case.options)
    batch = {key: values.repeat(200) for key, values in make_batch().items()}
    rows = gradfold.plan(accumulator, batch, memory="8GiB").rows
    (needed,) = (row.needed_bytes for row in rows if row.micro_batch_size == 512)
    found = gradfold.plan(accumulator, batch, memory=needed)
    return found.micro_batch_size, {row.saving: row.micro_batch_size for row in found.rows if row.saving}


def refused(rank, size):
    """Models whose shards cannot be repeated on a copy, or run on fake tensors."""
    recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
    fully_shard(recurrent, mesh=mesh_of(size))
    accumulator = gradfold.Accumulator(recurrent, lambda model, batch: model(batch)[0].mean())
    return outcome(lambda: gradfold.plan(accumulator, torch.randn(8, 3, WIDTH), memory="1GiB"))


def train(accumulator, optimizer, batch):
    accumulator.backward(batch)
    optimizer.step()
    optimizer.zero_grad()


def track(accumulator, optimizer, batch):
    tracker = MemoryTracker(accumulator.model, optimizer)
    tracker.register(batch.values(), "inputs")
    with tracker:
        accumulator.backward(batch)
        optimizer.step()
    optimizer.zero_grad()
    return {phase: one.total for phase, one in tracker.trace.peaks().items()}
