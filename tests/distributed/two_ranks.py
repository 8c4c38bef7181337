"""What each of two ranks does; started by torchrun. argv: store, answers."""

import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from session.models import N, ask, loss_of, make_data, make_model
from torchrun import leave

import logra_kernels as lk
from logra_kernels.curvature import CURVATURES, RawFisher
from logra_kernels.errors import LograError
from logra_kernels.store import Share

KINDS = ["raw", "shrunk", "diagonal", "corrected-kronecker", "lowrank", "kfac", "ekfac", "fisher"]
LEARNED = ["pca shrunk", "pca ekfac"]  # with a projection that is learned


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
    projection = lk.Projection(rank=3, kind="pca" if kind in LEARNED else "orthonormal")
    options = {"projection": projection, "curvature": kind.removeprefix("pca "), "rows_per_shard": 4}
    return options | {"fisher_while_logging": kind == "raw"}


def observe(run, order, context) -> None:
    x, target = make_data()
    for part in (order[:5], order[5:]):
        with context():
            loss_of(run.model, x[part], target[part]).backward()


def watch_and_log(run, kind: str, order) -> None:
    if kind in LEARNED:
        observe(run, order, run.observe)
    log(run, order)
    if kind.endswith("kfac"):
        observe(run, order, run.observe)
    if kind == "fisher":
        observe(run, order, run.observe_fisher)


def log(run, order) -> None:
    x, target = make_data()
    for start in range(0, len(order), 3):
        part = order[start : start + 3]
        with run.log([f"row{i}" for i in part]):
            loss_of(run.model, x[part], target[part]).backward()


def alone(path: str, mine) -> None:
    """One rank only observes: refused on every rank."""
    run = lk.DistributedRun(path, make_model(), **options("pca shrunk"))
    if dist.get_rank() == 0:
        observe(run, mine, run.observe)
    with pytest.raises(LograError, match="ranks observed unlike things .rank 0: expand, rank 1: nothing."):
        log(run, mine)
    run.close()


def resumed(path: str, mine) -> None:
    """Rank 1 was killed before its first row: it goes on with the factors that rank 0's rows have."""
    run = lk.DistributedRun(path, make_model(), **options("pca ekfac"))
    observe(run, mine, run.observe)
    if dist.get_rank() == 0:
        log(run, mine[:6])
    else:
        ask(run)  # where it decides, too
    run.close()
    run = lk.DistributedRun(path, make_model(), **options("pca ekfac"))
    log(run, mine)
    query = ask(run)
    run.finalize()
    torch.save(answers(run, query), f"{path}.{dist.get_rank()}.pt")
    run.close()


def late(read: Callable) -> Callable:
    """On rank 1, after rank 0 may have written what it found missing."""

    def reads(*args, **kwargs):
        time.sleep(0.1 * dist.get_rank())
        return read(*args, **kwargs)

    return reads


def main(directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    half = N // 2 + 1  # unequal parts
    mine = list(range(half)) if dist.get_rank() == 0 else list(range(half, N))
    for kind in KINDS + LEARNED:
        run = lk.DistributedRun(f"{directory}/{kind}", make_model(), **options(kind))
        watch_and_log(run, kind, mine)
        query = ask(run)
        with pytest.MonkeyPatch.context() as patch:
            if kind == "raw":
                patch.setattr(RawFisher, "_over_ranks", lambda *_: pytest.fail("a pass over rows summed while logging"))
            patch.setattr(Share, "sidecar_read", late(Share.sidecar_read))
            run.finalize()
        torch.save(answers(run, query), f"{directory}/{kind}.{dist.get_rank()}.pt")
        with pytest.raises(LograError, match="rows are merged"), run.log(["more"]):
            x, target = make_data(1)
            loss_of(run.model, x, target).backward()
        for context in (run.observe, run.observe_fisher):
            with pytest.raises(LograError, match="rows are merged; observe more of"), context():
                pass
        run.close()
    assert set(KINDS) <= set(CURVATURES)
    with pytest.raises(LograError, match="is finished; open it with Run"):
        lk.DistributedRun(f"{directory}/raw", make_model())
    alone(f"{directory}/alone", mine)
    resumed(f"{directory}/resumed", mine)
    run = lk.DistributedRun(f"{directory}/half", make_model())
    if dist.get_rank() == 0:
        log(run, mine)
    with pytest.raises(LograError, match="rank 1 has logged no rows"):
        run.finalize()
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
