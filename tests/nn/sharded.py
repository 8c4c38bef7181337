"""Run by torchrun in two processes: what each check finds, as one line of JSON from the first of them."""

import json
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchrun import leave

import logra_kernels as lk
from logra_kernels.nn import model_fingerprint

SMALL = lk.Projection(rank=4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 22), nn.Linear(22, 12), nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(x + self.down(torch.tanh(self.up(x))))


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(12, 5))


def data(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 7, 12, generator=generator), torch.randn(3, 7, 5, generator=generator)


def loss_of(model, x, target):
    return nn.functional.mse_loss(model(x), target, reduction="sum")


def rows(model, x, target, projection=SMALL, weights=None, offsets=None, **options):
    with lk.capture(model, projection, **options) as taps:
        taps.reset(weights=weights, offsets=offsets)
        loss_of(model, x, target).backward()
    return taps.rows()


def error(got, exact) -> float:
    return float((got - exact).norm(dim=1).div(exact.norm(dim=1)).max())


def fsdp(frozen: bool):
    model, batch = make(), data(dist.get_rank())  # each process has samples of its own
    exact = rows(model, *batch, kinds=["linear", "norm"])
    plain = model_fingerprint(model)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    assert model_fingerprint(model) == plain, "the fingerprint is that of the whole model"
    model.requires_grad_(not frozen)
    return error(rows(model, *batch, kinds=["linear", "norm"]), exact)


def fsdp_run():
    """Every process logs its samples into a store of its own."""
    model, batch = make(), data(dist.get_rank())
    exact = rows(model, *batch)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    with tempfile.TemporaryDirectory() as path, lk.Run(f"{path}/s", model, projection=SMALL) as run:
        with run.log(["a", "b", "c"]):
            loss_of(model, *batch).backward()
        return error(run.commit().read(0, 3), exact)


def verified():
    """What cannot be compared is said, and no false alarm is raised."""
    model, batch = make(), data(2)
    for block in model[:2]:
        fully_shard(block)
    with tempfile.TemporaryDirectory() as path, lk.Run(f"{path}/s", model, projection=SMALL) as run:
        report = run.verify(lambda part: loss_of(model, *(v[part] for v in batch)), samples=3)
    assert sum("spread over processes: not compared" in note for note in report.notes) == 4, report
    assert report.ok, report
    return report.error


def tensor_parallel(**options):
    """Both processes have the same samples."""
    model, batch = make(), data(2)
    bias = options.pop("bias", False)
    filters = {"include": ["*.up", "2"], "bias": True} if bias else {}
    exact = rows(model, *batch, **options, **filters)
    columns_and_rows = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model[:2]:
        parallelize_module(block, init_device_mesh("cpu", (2,)), columns_and_rows)
    return error(rows(model, *batch, **options, **filters), exact)


def tensor_parallel_modes():
    """Token shares and covariances, whose sums over processes are other ones."""
    found = []
    for parallel in (False, True):
        model, batch = make(), data(2)
        if parallel:
            plan = {"0.up": ColwiseParallel(), "0.down": RowwiseParallel()}
            parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        with lk.capture(model, SMALL, include=["0.*"]) as taps:
            m = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
            with taps.tokens(m) as tokens:
                loss_of(model, *batch).backward()
            with taps.covariances() as covariances:
                loss_of(model, *batch).backward()
        sums = [side.flatten() for layer in covariances.layers.values() for side in (layer.a, layer.b)]
        found.append(torch.cat([tokens.shares.flatten(), *sums])[None])
    return error(found[1], found[0])


def refused():
    """A layer whose outputs are cut by positions is named, not given a wrong gradient."""
    model = make()
    plan = {"0.up": ColwiseParallel(), "0.down": RowwiseParallel(output_layouts=Shard(1))}
    parallelize_module(model[:1], init_device_mesh("cpu", (2,)), plan)
    with lk.capture(model, SMALL, include=["0.down"]):
        try:
            model[0].down(torch.randn(3, 8, 11))
        except ValueError as message:
            return 0.0 if "layer '0.down' got a DTensor (3, 8, 22)" in str(message) else 1.0
    return 2.0


CHECKS = {
    "fsdp": lambda: fsdp(frozen=False),
    "fsdp frozen": lambda: fsdp(frozen=True),
    "fsdp run": fsdp_run,
    "verified": verified,
    "tensor parallel": tensor_parallel,
    "tensor parallel identity": lambda: tensor_parallel(projection=lk.Projection(kind="identity")),
    "tensor parallel bias": lambda: tensor_parallel(bias=True),
    "tensor parallel weights": lambda: tensor_parallel(weights=torch.arange(21.0).view(3, 7)),
    "tensor parallel packed": lambda: tensor_parallel(offsets=torch.tensor([0, 4, 9, 21])),
    "tensor parallel modes": tensor_parallel_modes,
    "refused": refused,
}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {}
    for name, check in CHECKS.items():
        worst = torch.tensor(check())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        found[name] = float(worst)
    if dist.get_rank() == 0:
        json.dump(found, sys.stdout)
    leave()
