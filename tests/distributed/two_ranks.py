"""What each of two ranks does; started by torchrun. argv: store, answers."""

import sys

import pytest
import torch
import torch.distributed as dist
from session.models import N, ask, loss_of, make_data, make_model
from torchrun import leave

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES
from logra_kernels.errors import LograError

KINDS = ["raw", "shrunk", "diagonal", "corrected-kronecker", "lowrank"]


def answers(run, query) -> dict:
    found = {"self_influence": run.self_influence(), "l2": run.statistics().l2}
    for mode in ("dot", "relatif", "l2"):
        top, bottom = run.extremes(query, 4, mode)
        best = run.topk(query, 4, mode)
        found |= {
            f"{mode} scores": run.scores(query, mode),
            f"{mode} top": top.values,
            f"{mode} topk": best.values,
            f"{mode} ids": [top.ids, best.ids, bottom.ids],
        }
    return found | {f"group {name}": part for name, part in run.group_scores(query).items()}


def options(kind: str) -> dict:
    return {"projection": lk.Projection(rank=3), "curvature": kind, "rows_per_shard": 4}


def log(run, order) -> None:
    x, target = make_data()
    for start in range(0, len(order), 3):
        part = order[start : start + 3]
        with run.log([f"row{i}" for i in part]):
            loss_of(run.model, x[part], target[part]).backward()


def main(directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    half = N // 2 + 1  # unequal parts
    mine = list(range(half)) if dist.get_rank() == 0 else list(range(half, N))
    for kind in KINDS:
        run = lk.DistributedRun(f"{directory}/{kind}", make_model(), **options(kind))
        log(run, mine)
        query = ask(run)
        run.finalize()
        torch.save(answers(run, query), f"{directory}/{kind}.{dist.get_rank()}.pt")
        with pytest.raises(LograError, match="rows are merged"), run.log(["more"]):
            x, target = make_data(1)
            loss_of(run.model, x, target).backward()
        run.close()
    assert set(KINDS) <= set(CURVATURES)
    with pytest.raises(ValueError, match="'kfac' is not summed over ranks"):
        lk.DistributedRun(f"{directory}/no", make_model(), curvature="kfac")
    with pytest.raises(LograError, match="is finished; open it with Run"):
        lk.DistributedRun(f"{directory}/raw", make_model())
    run = lk.DistributedRun(f"{directory}/half", make_model())
    if dist.get_rank() == 0:
        log(run, mine)
    with pytest.raises(LograError, match="rank 1 has logged no rows"):
        run.finalize()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
